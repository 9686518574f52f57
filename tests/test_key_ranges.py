"""Ranges, positions and windows beyond 32 bits: refused or cut, never wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import make_case

import lvlm_fastxai as fx
from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.ops import key_ranges

WRAPPED = 2**32 + 3  # 3 in 32 bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_positions": torch.tensor([[0, WRAPPED]])}, "`query_positions` must hold numbers within int32, got"),
        ({"query_positions": torch.tensor([[-WRAPPED, 0]])}, "`query_positions` must hold numbers within int32, got -"),
        ({"lengths": torch.tensor([WRAPPED])}, "`lengths` must hold numbers within int32, got 4294967299"),
        ({"lengths": torch.tensor([[0, WRAPPED]])}, "`lengths` must hold numbers within int32, got 4294967299"),
        ({"window": WRAPPED}, "`window` must be at most 2147483647, got 4294967299"),
    ],
)
def test_what_32_bits_do_not_hold_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        key_ranges(1, 2, 5, **options)


@pytest.mark.parametrize("operator", [fx.ops.relevancy_product, fx.ops.glimpse_statistics])
def test_operators_refuse_them_too(operator: Callable[..., Any]) -> None:
    case = make_case(queries=9)
    tensors = case.tensors[: 6 if operator is fx.ops.relevancy_product else 5]
    ranges = case.ranges.long()
    ranges[0, 4, 1] = WRAPPED
    with pytest.raises(ArgumentError, match="`key_ranges` must hold numbers within int32, got 4294967299"):
        operator(*tensors, key_ranges=ranges)


def test_sums_at_the_end_of_32_bits_do_not_wrap() -> None:
    last = 2**31 - 1
    positions = torch.tensor([[last, -last]])
    assert key_ranges(1, 2, 5, query_positions=positions).tolist() == [[[0, 5], [0, 0]]]
    both = key_ranges(1, 2, 5, query_positions=positions, causal=False, window=last)
    assert both.tolist() == [[[1, 5], [0, 0]]]
    assert key_ranges(1, 1, 5, window=last).tolist() == [[[0, 5]]]
    assert key_ranges(1, 1, 5, lengths=torch.tensor([[-last, last]])).tolist() == [[[0, 5]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_positions_of_any_integers(dtype: torch.dtype) -> None:
    positions = torch.tensor([[1, 3]], dtype=dtype)
    assert key_ranges(1, 2, 5, query_positions=positions).tolist() == [[[0, 2], [0, 4]]]


def test_a_compiled_graph_cuts_them_instead() -> None:
    """As on a GPU, where looking at the values would wait for the device; the keys are the same."""
    case = make_case(queries=9, causal=False)
    ranges = torch.tensor([-WRAPPED, WRAPPED]).expand(1, 9, 2)
    torch._dynamo.reset()
    compiled = torch.compile(fx.ops.relevancy_product, fullgraph=True, backend="aot_eager")
    expected = fx.ops.relevancy_product(*case.tensors, key_ranges=case.ranges)
    assert torch.equal(compiled(*case.tensors, key_ranges=ranges), expected)
