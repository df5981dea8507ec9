"""Problem -> cost and configuration, one module per op. Pure functions of numbers: no torch, no CUDA query.

Every module has `Problem` (frozen), `flops(problem)`, `bytes(problem)`, `backends(problem, device, env)` and,
where a kernel has a choice of tile, `Config` (frozen), `candidates`, `is_legal`, `cost`, `select`.
"""
