"""attention_backward_relevancy under pytest-benchmark: `pytest benchmarks/bench_attention_backward_relevancy.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import op
from lvlm_fastxai import ops


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("name", op.CASES)
def test_attention_backward_relevancy(benchmark: Any, name: str, backend: str) -> None:
    reason = ops.backends("attention_backward_relevancy")[backend]
    if reason is not None or backend == "cuda":
        pytest.skip(reason or "the shapes are built on the CPU")
    (query, key, value, grad_output, logsumexp, row), options = op.build(op.CASES[name])
    # Any tensor of its shape will do for the output: it enters a row's D only.
    arguments = query, key, value, query, grad_output, logsumexp, row
    benchmark.group = name
    call, options = ops.attention_backward_relevancy, {**options, "backend": backend}
    benchmark.pedantic(call, arguments, options, rounds=5, warmup_rounds=1, iterations=1)
