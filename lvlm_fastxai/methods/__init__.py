"""One class per method; each is a short loop over a :class:`~lvlm_fastxai.sweep.descent.Sweep`'s layers."""

from __future__ import annotations

from ..errors import ArgumentError
from ._base import Method
from .chefer import Chefer
from .glimpse import Glimpse, GlimpseOptions
from .lvlm_interpret import LvlmInterpret
from .raw_attention import RawAttention

METHODS: dict[str, type[Method]] = {method.name: method for method in (Chefer, LvlmInterpret, Glimpse, RawAttention)}

__all__ = [
    "METHODS",
    "Chefer",
    "Glimpse",
    "GlimpseOptions",
    "LvlmInterpret",
    "Method",
    "RawAttention",
    "check_options",
    "find",
]


def find(name: str) -> type[Method]:
    """The method's class.

    Raises:
        ArgumentError: no method has this name.
    """
    if name not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def check_options(name: str, options: object) -> None:
    """Refuse options that are not the method's.

    Raises:
        ArgumentError: no method has this name, or it takes no options or others.
    """
    kind = find(name).options_type
    if options is not None and (kind is None or not isinstance(options, kind)):
        expected = "no options" if kind is None else kind.__name__
        raise ArgumentError(f"options: method {name!r} takes {expected}, got {options!r}")
