"""The pruned sweep, measured: ``python -m benchmarks pruned``.

A text or a question is one entry of a list in `texts.py`; a measurement one entry of `command.measurements`.
"""
