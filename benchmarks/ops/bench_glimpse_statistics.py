"""glimpse_statistics under pytest-benchmark: `pytest benchmarks/ops/bench_glimpse_statistics.py`.

Prediction, written before the first run: under a causal mask the full domain takes the score on half of the square and
the gradient on all of it, three halves where relevancy_product does two, so 1.5 times its time; the causal domain, two
halves, 1.0. Ratios of one run: `python -m benchmarks op --operator glimpse_statistics --case decoder-2048`.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ops import cases
from lvlm_fastxai import ops


@pytest.mark.parametrize("domain", ["full", "causal"])
@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("name", cases.CASES)
def test_glimpse_statistics(benchmark: Any, name: str, backend: str, domain: str) -> None:
    reason = ops.backends("glimpse_statistics")[backend]
    if reason is not None or backend == "cuda":
        pytest.skip(reason or "the shapes are built on the CPU")
    tensors, options = cases.build(cases.CASES[name])
    arguments = cases.arguments_of("glimpse_statistics", tensors)
    benchmark.group = f"{name}-{domain}"
    if domain == "full":
        found = cases.operations(cases.CASES[name], options["key_ranges"], "glimpse_statistics")
        benchmark.extra_info["operations"] = found
    options = {**options, "backend": backend, "domain": domain}
    benchmark.pedantic(ops.glimpse_statistics, arguments, options, rounds=5, warmup_rounds=1, iterations=1)
