"""What passes between a sweep and the attention of the layer that is running: a request, and what it leaves."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import UnsupportedModelError


@dataclass(slots=True)
class Request:
    """What a sweep asks of one layer's attention.

    Attributes:
        keys_only: end the layer with :class:`KeysTaken` as soon as its key and value, graph included, are recorded.
        given: (key, value, key_ranges) that the layer's queries, a few rows of the sequence, attend to instead of their
            own keys and values.
        backend: whose `attention_backward_relevancy` the next backward is; None for torch's own backward.
        weights: (B, 1, Sq) running relevancy of the query rows; the next backward then records its ``product``.
    """

    keys_only: bool = False
    given: tuple[Tensor, Tensor, Tensor] | None = None
    backend: str | None = None
    weights: Tensor | None = None


@dataclass(slots=True)
class Record:
    """What one layer's attention leaves for the sweep.

    Attributes:
        calls: how often the layer called the attention.
        query: (B, H, Sq, d).
        key, value: (B, Hkv, Sk, d).
        logsumexp: (B, H, Sq).
        key_ranges: (B, Sq, 2) int32, half-open.
        scale: of the scores.
        grad_output: (B, H, Sq, d) dO of the backward that ran last.
        product: (B, 1, Sk) of `relevancy_product` for the requested weights, where the backward gave it.
    """

    calls: int = 0
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    logsumexp: Tensor | None = None
    key_ranges: Tensor | None = None
    scale: float = 1.0
    grad_output: Tensor | None = None
    product: Tensor | None = None

    def take_grad_output(self, layer: int) -> Tensor:
        """Return dO (B, H, Sq, d) and let go of it.

        Raises:
            UnsupportedModelError: no gradient has reached the attention of this layer.
        """
        grad_output, self.grad_output = self.grad_output, None
        if grad_output is None:
            raise UnsupportedModelError(f"decoder layer {layer}: no gradient reaches its attention")
        return grad_output


@dataclass(slots=True)
class Tape:
    """The request and the record of one run of one layer."""

    request: Request = field(default_factory=Request)
    record: Record = field(default_factory=Record)


class KeysTaken(Exception):
    """Ends a layer that was called for its keys and values alone."""


# The tape of the layer that is running. A context variable, so that threads that explain different models do not see
# each other's.
current_tape: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("lvlm_fastxai_tape", default=None)
