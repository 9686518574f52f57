"""Targets, errors of rows, and guards of memory, for the tests of whole sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import models, oracle

MEMORY = ("fast", "lean", "min")
Target = tuple[int, int, int]


def without_self(rows: Tensor, targets: Sequence[Target]) -> Tensor:
    """Rows less their self entry 1, which would hide part of a relative error."""
    rows = rows.double().clone()
    for n, (_, query_row, _) in enumerate(targets):
        rows[n, query_row] -= 1.0
    return rows


def errors(found: Tensor, truth: Tensor, targets: Sequence[Target]) -> Tensor:
    """(N,) relative L1 error of the relevancy without the self entry."""
    return oracle.relative_error(without_self(found, targets), without_self(truth, targets))


def some_targets(inputs: Mapping[str, Any]) -> list[Target]:
    """First and last answer token of every sample, and one token inside the prompt of the first."""
    targets = []
    for sample in range(len(inputs["input_ids"])):
        answer = models.answer_targets(inputs, sample)
        targets += [answer[0], answer[-1]]
    inside = targets[0][1] - 4
    return [*targets, (0, inside, int(inputs["input_ids"][0, inside + 1]))]


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


# 8. Nothing quadratic in S.
class NoSquare(TorchDispatchMode):
    """Fails on any result with two dimensions ≥ S, or with S² elements or more however they are arranged."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                large = sum(size >= self.length for size in leaf.shape)
                owned = leaf.untyped_storage().nbytes() // leaf.element_size()
                if large >= 2 or max(leaf.numel(), owned) >= self.length**2:
                    raise AssertionError(f"{func} made a tensor {tuple(leaf.shape)} at S = {self.length}")
        return result


@contextmanager
def largest_allocation() -> Iterator[list[int]]:
    """Bytes of the largest single allocation from torch's allocator, inside of operators as well."""
    found = [0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield found
    # Only the raw events hold every allocation; the summed-up ones are net of what an operator frees again.
    events = record.profiler.kineto_results.events()
    found[0] = max(event.nbytes() for event in events if event.name() == "[memory]")


LENGTH = 420


def long_batch(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    model = models.make_model(name, dtype, layers=2)
    samples = [models.make_sample(name, model, seed=i, text=LENGTH - 120 + 40 * i) for i in range(2)]
    inputs = models.join(name, samples, "left", LENGTH)
    widest = max(max(parameter.shape) for parameter in model.parameters())
    vision = max(v.shape[0] for k, v in inputs.items())
    assert inputs["input_ids"].shape == (2, LENGTH)
    assert max(widest, vision, models.VOCABULARY) < LENGTH
    return model, inputs
