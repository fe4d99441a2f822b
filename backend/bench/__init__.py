"""Behind `python -m moebius`: the demo, the sweep, the memory plan and the doctor.

Layers, one direction: `cli` -> `demo`, `sweep`, `plan`, `doctor` -> `demo_rank`, `sweep_rank`, `report` -> `moe_layer`,
`baseline`, `bound`, `wire`, `page`, `svg` -> `ranks`, `workload`, `timing`, `start_line`, `console`, `machine`.
Nothing here is imported by `moebius` itself.
"""
