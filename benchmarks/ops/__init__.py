"""The operators on a CPU: `op`, `backward`, and ``bench_<operator>.py`` for pytest-benchmark.

A shape is one entry of a list in `cases.py`; what an operator computes is one entry of `cases.WORK`.
"""
