"""Behind `python -m moebius`: the demo, the sweep, the load, the memory plan and the doctor.

Layers, one direction: `cli` -> `demo`, `sweep`, `load`, `plan`, `doctor` -> `load_report`, `load_results` ->
`demo_rank`, `sweep_rank`, `load_rank`, `report` -> `moe_layer`, `baseline`, `bound`, `wire`, `load_schedule`, `page`,
`svg` -> `ranks`, `workload`, `load_arrivals` -> `routing_trace`, `timing`, `start_line`, `console`, `machine`.
Nothing here is imported by `moebius` itself.
"""
