"""Problems for the operators on an attention's tensors: layouts, dtypes, and the tensors themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lvlm_fastxai as fx
from lvlm_fastxai import _native
from lvlm_fastxai.ops import key_ranges
from lvlm_fastxai.reference import relevancy_product as dense

GPU_BACKENDS = ("cuda", "triton")
native = pytest.mark.skipif(_native.load() is not None, reason=f"native library: {_native.load()}")
# Triton decides when it is imported whether kernels run in its interpreter, so that they have a session of their own,
# on the CPU; test_triton.py starts it. The interpreter computes bfloat16 wrongly, and a tile costs it milliseconds.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
if INTERPRETED:
    BACKENDS: list[Any] = ["triton"]
else:
    BACKENDS = [
        pytest.param("cpu", marks=native),
        *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS),
    ]
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 63, 150] if INTERPRETED else [1, 63, 257, 1000]


def device_of(backend: str) -> str:
    """Where a backend's tensors live."""
    return "cuda" if backend in GPU_BACKENDS and not INTERPRETED and torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    logsumexp: Tensor
    row: Tensor
    ranges: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.grad_output, self.logsumexp, self.row

    def dense(self, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
        """The twin on these inputs, converted to a dtype."""
        state = torch.float64 if dtype == torch.float64 else torch.float32
        moved = [t.to(dtype) for t in self.tensors[:4]] + [t.to(state) for t in self.tensors[4:]]
        return dense(*moved, *self.ranges.unbind(-1), self.query.shape[-1] ** -0.5, **options)

    def run(self, backend: str = "cpu", **options: Any) -> Tensor:
        """The operator on these inputs, on the backend's device; the result is on the CPU."""
        device = device_of(backend)
        moved = [t.to(device) for t in self.tensors]
        return fx.ops.relevancy_product(*moved, key_ranges=self.ranges.to(device), backend=backend, **options).cpu()

    def laid_out(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same with the tensors of the attention, which come as views from a model, changed in layout."""
        four = {name: change(getattr(self, name)) for name in ("query", "key", "value", "grad_output")}
        assert not four["query"].is_contiguous()
        return replace(self, **four)


def as_view(tensor: Tensor) -> Tensor:
    """(…, H, S, d) laid out as (…, S, H, d), which is how transformers passes it."""
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers with a last axis that is not contiguous."""
    return torch.stack((tensor, tensor + 1), -1)[..., 0]


def make_case(
    batch: int = 1,
    heads: int = 2 if INTERPRETED else 4,
    key_heads: int = 1 if INTERPRETED else 2,
    targets: int = 1,
    queries: int = 63,
    keys: int | None = None,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    gradients: int | None = None,
    seed: int = 0,
    **layout: Any,
) -> Case:
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key, value = (
        normal(batch, heads, queries, width),
        normal(batch, key_heads, keys, width),
        normal(batch, key_heads, keys, width),
    )
    ranges = layout.pop("ranges", None)
    ranges = key_ranges(batch, queries, keys, **layout) if ranges is None else ranges
    case = Case(
        query,
        key,
        value,
        normal(batch, targets if gradients is None else gradients, heads, queries, width),
        torch.empty(0),
        torch.rand(batch, targets, queries, generator=generator),
        ranges,
    )
    return replace(case, logsumexp=logsumexp(case))


def logsumexp(case: Case) -> Tensor:
    group = case.query.shape[1] // case.key.shape[1]
    scores = case.query.double() @ case.key.double().repeat_interleave(group, 1).mT * case.query.shape[-1] ** -0.5
    position = torch.arange(case.key.shape[2])
    visible = (position >= case.ranges[..., :1]) & (position < case.ranges[..., 1:])
    return scores.masked_fill(~visible[:, None], -torch.inf).logsumexp(-1).float()


def relative_error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).abs().sum() / truth.abs().sum()).item()


def assert_same(result: Tensor, expected: Tensor, backend: str) -> None:
    """The same numbers summed in the same order; a GPU's tiles differ with the number of targets and with the rows."""
    if backend == "cpu":
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def ragged_case() -> Case:
    """Neighbouring rows that see nothing in common, rows that see nothing, and weights with zeros in between."""
    generator = torch.Generator().manual_seed(1)
    bounds = torch.randint(0, 301, (2, 200, 2), generator=generator, dtype=torch.int32)
    bounds[0, :100] = bounds[0, :100].sort(-1).values
    case = make_case(batch=2, targets=2, queries=200, keys=300, ranges=bounds)
    case.row[torch.rand(case.row.shape, generator=generator) < 0.4] = 0
    case.row[0, :, 64:128] = 0
    return case


LAYOUTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 17},
    "window_of_one": {"window": 1},
    "window_bidirectional": {"causal": False, "window": 40},
    "right_padding": {"lengths": torch.tensor([101, 64])},
    "left_padding": {"lengths": torch.tensor([[29, 130], [0, 130]])},
    "window_and_padding": {"window": 30, "lengths": torch.tensor([[29, 130], [0, 130]])},
}


def prefix_and_image_block() -> Tensor:
    """PaliGemma's prefix of 50 and Gemma 3's image block 60 … 90 are ranges like any other."""
    position = torch.arange(120)
    end = torch.where(position < 50, 50, position + 1)
    end = torch.where((position >= 60) & (position < 90), 90, end)
    return torch.stack((torch.zeros_like(end), end), -1)[None].to(torch.int32)


def _problems() -> Iterator[Any]:
    def param(name: str, **options: Any) -> Any:
        return pytest.param(options, id=name)

    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        # The interpreter takes seconds for what a processor does in microseconds, and the same way in both dtypes.
        few = INTERPRETED and dtype != torch.float32
        for name in ("causal", "window_and_padding") if few else LAYOUTS:
            yield param(f"{name}-{short}", batch=2, targets=2, queries=130, dtype=dtype, **LAYOUTS[name])
        for length in (63,) if few else LENGTHS:
            yield param(f"length-{length}-{short}", heads=2, key_heads=1, queries=length, dtype=dtype)
        for width in (17, 72, 128) if few else (1, 17, 64, 72, 80, 96, 128, 256, 300):
            yield param(f"width-{width}-{short}", queries=100, width=width, dtype=dtype)
    for heads, key_heads in ((1, 1), (8, 8), (8, 2), (9, 3), (6, 1)):
        yield param(f"heads-{heads}-{key_heads}", batch=2, heads=heads, key_heads=key_heads, queries=70)
    for queries, keys in ((1, 300), (40, 300), (300, 300), (300, 40)):
        for causal in (True, False):
            name = f"{queries}-queries-{keys}-keys{'-causal' if causal else ''}"
            yield param(name, queries=queries, keys=keys, causal=causal)
    yield param("prefix-and-image-block", queries=120, ranges=prefix_and_image_block())


# Options of `make_case`: what every backend of every operator is compared with the twin on.
PROBLEMS = list(_problems())
