"""One class per method; each is a short loop over a :class:`~lvlm_fastxai.sweep.Sweep`'s layers."""

from __future__ import annotations

from ..errors import ArgumentError
from ._base import Method
from .chefer import Chefer
from .glimpse import Glimpse, GlimpseOptions
from .lvlm_interpret import LvlmInterpret
from .raw_attention import RawAttention

METHODS: dict[str, type[Method]] = {method.name: method for method in (Chefer, LvlmInterpret, Glimpse, RawAttention)}

__all__ = ["METHODS", "Chefer", "Glimpse", "GlimpseOptions", "LvlmInterpret", "Method", "RawAttention", "find"]


def find(name: str) -> type[Method]:
    """The method's class.

    Raises:
        ArgumentError: no method has this name.
    """
    if name not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
