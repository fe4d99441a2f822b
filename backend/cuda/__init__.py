"""The CUDA engine's side in Python: memory between processes, and rounds whose numbers the device keeps.

Of the package, nothing here is imported before a device is asked for; cuda-bindings only when ranks live in several
processes.
"""
