"""What upstream's native object tells its callers."""

from __future__ import annotations

import torch


class Runtime:
    """Stands where upstream keeps its native buffer."""

    def __init__(self, num_ranks: int, rank: int) -> None:
        """Describe a world of one RDMA rank per rank, as upstream's low-latency mode has."""
        self._num_ranks = num_ranks
        self._rank = rank
        self.is_destroyed = False

    def is_available(self) -> bool:
        """Whether the buffer can be used."""
        return not self.is_destroyed

    def is_internode_available(self) -> bool:
        """False: that is of the normal mode."""
        return False

    def get_num_rdma_ranks(self) -> int:
        """Number of ranks."""
        return self._num_ranks

    def get_rdma_rank(self) -> int:
        """This rank."""
        return self._rank

    def get_local_device_id(self) -> int:
        """The current device; 0 without a GPU."""
        return torch.cuda.current_device() if torch.cuda.is_available() else 0
