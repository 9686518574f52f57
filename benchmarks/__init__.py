"""Benchmarks: ``python -m benchmarks --help`` for whole explanations and operators, pytest-benchmark for the rest.

    common/       the machine, the clock, peak memory, results files, tables, plots
    models/       decoders of random weights, SmolLM2
    ops/          `op`, `backward`, and bench_<operator>.py for pytest-benchmark
    real_lvlm/    `real-lvlm`
    sweeps/       `end-to-end`, `glimpse`, `pruned`
    fastrm/       `fastrm`
    gpu/          `gpu` and its parts
    results/      committed figures, each with its machine and commit
    summary.py    `summary`

A room imports only from rooms above it in this list. Shapes, variants and baselines are data: a case is one entry of
one list.

- a shape of an operator: `CASES`, `BACKWARD_CASES` or `COLUMNS` in `ops/cases.py`; on a GPU `MODELS` in `gpu/op.py` and
  `CASES` in `gpu/proxy.py`
- what an operator computes: `WORK` in `ops/cases.py`
- a decoder: `CASES` in `models/decoders.py`; of 7B `CASES` in `gpu/end_to_end.py`
- a way to explain, or a baseline: `VARIANTS` in `sweeps/variants.py`; options of GLIMPSE: those in `sweeps/glimpse.py`
- a text or a question: `sweeps/pruned/texts.py`
- a head: `ABLATIONS` in `fastrm/heads.py`
- a step of `gpu`: `STEPS` in `gpu/steps.py`; what must be shown: `CLAIMS` in `gpu/claims.py`
- a command: `SUITES` in `__main__.py`
"""
