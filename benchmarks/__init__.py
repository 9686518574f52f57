"""Benchmarks: ``python -m benchmarks --help`` for whole explanations and operators, pytest-benchmark for the rest."""
