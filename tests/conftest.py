"""What holds for every test."""

import torch
from hypothesis import settings

# Two shared cores and forked ranks make single examples slow at random: no deadline of their own.
settings.register_profile("moebius", deadline=None, print_blob=True)
settings.load_profile("moebius")

# Tensors here are tiny: a second thread costs more than it does, and takes a core from the ranks.
torch.set_num_threads(1)
