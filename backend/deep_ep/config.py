"""DeepEP's tuning record of its normal mode, which its callers build to size a buffer."""

from __future__ import annotations

from moebius.deep_ep.keywords import strict_keywords


class Config:
    """SMs and chunk sizes of the normal mode. Kept as they came: this package has no normal mode to tune."""

    @strict_keywords
    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        """Keep SMs to occupy, and tokens sent and queued at once over NVLink and RDMA."""
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens

    @strict_keywords
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0 bytes: nothing of the normal mode is ever placed in the buffer."""
        return 0

    @strict_keywords
    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0 bytes: nothing of the normal mode is ever placed in the buffer."""
        return 0
