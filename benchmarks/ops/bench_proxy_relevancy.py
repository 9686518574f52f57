"""proxy_relevancy under pytest-benchmark: `pytest benchmarks/ops/bench_proxy_relevancy.py`.

Shares of the copy bandwidth in one run: `python -m benchmarks op --operator proxy_relevancy`.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ops import cases
from lvlm_fastxai import ops


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("name", cases.COLUMNS)
def test_proxy_relevancy(benchmark: Any, name: str, backend: str) -> None:
    reason = ops.backends("proxy_relevancy")[backend]
    if reason is not None or backend == "cuda":
        pytest.skip(reason or "the shapes are built on the CPU")
    case = cases.COLUMNS[name]
    arguments = cases.build_columns(case)
    benchmark.group = name
    benchmark.extra_info["bytes"] = arguments[0].nbytes
    options = {"norm": case.norm, "backend": backend}
    benchmark.pedantic(ops.proxy_relevancy, arguments, options, rounds=5, warmup_rounds=1, iterations=1)
