"""Ranks of the CPU engine on several hosts: its network over `torch.distributed`. For correctness and small clusters.

`network` is what the engine sends by, `link` the connection to one remote rank: docs/hosts.md.
"""
