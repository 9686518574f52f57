"""attention_backward_relevancy under pytest-benchmark.

Run it with `pytest benchmarks/ops/bench_attention_backward_relevancy.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ops import cases
from lvlm_fastxai import ops


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("name", cases.CASES)
def test_attention_backward_relevancy(benchmark: Any, name: str, backend: str) -> None:
    reason = ops.backends("attention_backward_relevancy")[backend]
    if reason is not None or backend == "cuda":
        pytest.skip(reason or "the shapes are built on the CPU")
    tensors, options = cases.build(cases.CASES[name])
    arguments = cases.arguments_of("attention_backward_relevancy", tensors)
    benchmark.group = name
    call, options = ops.attention_backward_relevancy, {**options, "backend": backend}
    benchmark.pedantic(call, arguments, options, rounds=5, warmup_rounds=1, iterations=1)
