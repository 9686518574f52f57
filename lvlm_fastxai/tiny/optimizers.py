"""Gradients from many small parts of a batch, and the optimisers that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Workers:
    """Threads that compute with one core each.

    A batch is cut into small parts that whichever thread is free takes next. On a machine whose cores are shared this
    keeps every one of them busy, where two OpenMP threads inside one product would wait for the slower; and with
    matrices this small one core per part needs a third less processor time.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, losses: Sequence[Callable[[], torch.Tensor]], parameters: Sequence[nn.Parameter]) -> list[float]:
        """Set the parameters' gradients to those of the sum of the losses, added in their order.

        Returns:
            The losses' values.
        """

        def part(loss: Callable[[], torch.Tensor]) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            value = loss()
            return float(value.detach()), torch.autograd.grad(value, parameters, allow_unused=True)

        results = list(self.pool.map(part, losses))
        for index, parameter in enumerate(parameters):
            parts = [g for _, gradients in results if (g := gradients[index]) is not None]
            parameter.grad = torch.stack(parts).sum(0) if parts else None
        return [value for value, _ in results]


def deal(items: Sequence[T], parts: int) -> list[list[T]]:
    """Deal ``items`` like cards into at most ``parts`` lists, so that each holds a bit of everything.

    Example:
        >>> deal(range(5), 2)
        [[0, 2, 4], [1, 3]]
    """
    return [list(items[start::parts]) for start in range(parts) if len(items) > start]


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for everything else (embeddings, norms, biases, heads).

    Args:
        modules: each with a factor for its rates.
        matrix_rate: Muon's peak rate, in AdamW's scale (an update's root mean square per unit of rate).
        rate: AdamW's peak rate.
        workers: the threads that the updates run on.
    """

    def __init__(
        self, modules: Sequence[tuple[nn.Module, float]], matrix_rate: float, rate: float, workers: Workers
    ) -> None:
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for module, factor in modules:
            for name, parameter in module.named_parameters():
                hidden = parameter.ndim == 2 and ".layers." in f".{name}"
                # Where a patch is matters only to the second stage: these may move faster than the rest of the tower.
                own = max(factor, 0.5) if "position_embedding" in name else factor
                group = {"params": [parameter], "lr": own * (matrix_rate if hidden else rate)}
                (matrices if hidden else others).append(group)
        self.workers = workers
        self.parameters = [p for group in matrices + others for p in group["params"]]
        self.each: list[torch.optim.Optimizer] = [
            torch.optim.Muon(part, lr=matrix_rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            for part in deal(matrices, 2)
        ]
        self.each.append(torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)))
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.each]

    def step(self, factor: float) -> None:
        """Make one clipped update at ``factor`` times the peak rates, and clear the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peaks in zip(self.each, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        list(self.workers.pool.map(lambda optimizer: optimizer.step(), self.each))
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """What `load_state_dict` reads."""
        return [optimizer.state_dict() for optimizer in self.each]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from a state that `state_dict` gave."""
        for optimizer, state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)
