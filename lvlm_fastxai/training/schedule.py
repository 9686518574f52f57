"""Learning rates as factors of their peak, and the average of weights over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def warm_up_then_fall(step: int, total: int, fall_share: float, warm_up: int = 100) -> float:
    """Factor of the peak rate: a rise, a constant stretch, and a linear fall to zero.

    Args:
        step: steps that were made before this one.
        total: steps of the whole run.
        fall_share: share of ``total`` in which the rate falls, at its end.
        warm_up: steps in which it rises.

    Example:
        >>> [warm_up_then_fall(step, 10, 0.4, warm_up=2) for step in (0, 1, 5, 8)]
        [0.5, 1.0, 1.0, 0.5]
    """
    left = (total - step) / max(1.0, fall_share * total)
    return min(1.0, (step + 1) / warm_up, max(0.0, left))


def warm_up_then_cosine(step: int, total: int) -> float:
    """Factor of the peak rate: a rise over the first tenth of ``total`` steps, then half a cosine to zero.

    Example:
        >>> [round(warm_up_then_cosine(step, 20), 3) for step in (0, 1, 2, 11, 19)]
        [0.5, 1.0, 1.0, 0.5, 0.008]
    """
    warm = max(1, total // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


class Average:
    """Exponential moving average of a module's weights.

    The first updates count for more, so that the average forgets the weights it began with: the decay of update n is
    at most n / (n + 10).

    Args:
        model: whose weights are averaged; the average begins with them.
        decay: share of the average that an update keeps.

    Attributes:
        weights: the average, as ``model.state_dict()`` names it.
    """

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, self.updates / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` reads."""
        return {"weights": self.weights, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.weights, self.updates = state["weights"], state["updates"]
