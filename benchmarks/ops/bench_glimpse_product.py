"""glimpse_product under pytest-benchmark: `pytest benchmarks/ops/bench_glimpse_product.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ops import cases
from lvlm_fastxai import ops

COEFFICIENTS = 7  # rows that a sweep with a literal propagation carries


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("name", cases.CASES)
def test_glimpse_product(benchmark: Any, name: str, backend: str) -> None:
    import torch

    reason = ops.backends("relevancy_product")[backend]
    if reason is not None or backend == "cuda":
        pytest.skip(reason or "the shapes are built on the CPU")
    tensors, options = cases.build(cases.CASES[name])
    heads = tensors["query"].shape[1]
    row = tensors["row"][:, :, None].expand(-1, -1, COEFFICIENTS, -1)
    weights = torch.full((*row.shape[:2], heads), 1 / heads)
    sums = torch.ones(*row.shape[:2], heads, row.shape[-1])
    tensors |= {"row": row, "head_weights": weights, "row_sums": sums}
    arguments = cases.arguments_of("glimpse_product", tensors)
    benchmark.group = name
    benchmark.pedantic(
        ops.glimpse_product,
        arguments,
        {**options, "backend": backend},
        rounds=5,
        warmup_rounds=1,
        iterations=1,
    )
