"""The CUDA engine over NVSHMEM: one world in a process, and memory of it. Imported when a group asks for it."""
