"""relevancy_product under pytest-benchmark: `pytest benchmarks/ops/bench_relevancy_product.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ops import cases
from lvlm_fastxai import ops


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("name", cases.CASES)
def test_relevancy_product(benchmark: Any, name: str, backend: str) -> None:
    reason = ops.backends("relevancy_product")[backend]
    if reason is not None or backend == "cuda":
        pytest.skip(reason or "the shapes are built on the CPU")
    tensors, options = cases.build(cases.CASES[name])
    arguments = cases.arguments_of("relevancy_product", tensors)
    benchmark.group = name
    benchmark.extra_info["operations"] = cases.operations(cases.CASES[name], options["key_ranges"])
    benchmark.pedantic(
        ops.relevancy_product, arguments, {**options, "backend": backend}, rounds=5, warmup_rounds=1, iterations=1
    )
