"""One command that proves, or disproves, on one GPU what this project promises: ``python -m benchmarks.gpu_proof``.

It is made of *sections*. A section is a function ``run(setting, journal, **options)`` in a file of its own; `schedule`
lists them with their budgets, `runner` gives each a process, and `promises` reads what they wrote into one table.
docs/gpu.md explains the command to somebody with a GPU.
"""
