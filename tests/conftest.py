"""What holds for every test."""

import os

import torch
from hypothesis import settings

# Of virtual ranks on one GPU, before CUDA starts. Streams that share a hardware queue run in turn, and the ranks wait
# for one another; and a kernel that is loaded at its first use waits for those that run.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

# Two shared cores and forked ranks make single examples slow at random: no deadline of their own.
settings.register_profile("moebius", deadline=None, print_blob=True)
settings.load_profile("moebius")

# Tensors here are tiny: a second thread costs more than it does, and takes a core from the ranks.
torch.set_num_threads(1)
