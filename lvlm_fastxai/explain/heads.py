"""What the explainer asks of a head that predicts maps while the model generates; `FastRM` is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .relevancy_rows import RelevancyRows


class Step(Protocol):
    """One step of ``generate()``, with the predicted map of its token."""

    @property
    def logits(self) -> Tensor:
        """(B,) fp32, of the tokens."""

    @property
    def probabilities(self) -> Tensor:
        """(B,) fp32, of the tokens."""

    def row(self, sample: int = 0) -> Tensor:
        """(prompt length,) fp32 on the CPU: the map at the image's columns, 0 elsewhere."""

    def entropy(self, sample: int = 0) -> float:
        """Entropy of one answer's map, in 0 … 1."""


class Live(Protocol):
    """A streamer of one ``generate()`` call inside its ``with`` block; `steps` fill up as tokens appear."""

    steps: Sequence[Any]

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: object) -> None: ...


class Head(Protocol):
    """A head that was trained for one model."""

    @property
    def fingerprint(self) -> str:
        """Tells heads apart by their weights."""

    def check_model(self, model: nn.Module) -> None:
        """Raise ModelMismatchError for any other model."""

    def live_maps(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        image_sizes: Sequence[Sequence[tuple[int, int]]],
        image_processor: Any,
    ) -> Any:
        """Give the `Live` of one ``generate()`` call on these inputs."""


def predicted_rows(steps: Sequence[Step], columns: int) -> RelevancyRows:
    """Stack the steps' rows as a sweep would give them; only the image's columns have values.

    Args:
        steps: of the explained tokens.
        columns: of prompt and answer together.
    """
    rows = torch.stack([step.row() for step in steps])
    return RelevancyRows(
        nn.functional.pad(rows, (0, columns - rows.shape[1])),
        torch.cat([step.logits for step in steps]).cpu(),
        torch.cat([step.probabilities for step in steps]).cpu(),
    )
