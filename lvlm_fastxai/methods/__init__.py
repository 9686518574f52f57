"""Relevancy methods: one class each, which goes down the layers of a :class:`~lvlm_fastxai.sweep.descent.Descent`.

What each method is called, needs and costs stands in :mod:`~lvlm_fastxai.methods.registry`. Names are imported when
first used, so that importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from . import registry

if TYPE_CHECKING:
    from ._base import Method
    from .chefer import Chefer
    from .glimpse import Glimpse
    from .glimpse_options import GlimpseOptions
    from .lvlm_interpret import LvlmInterpret
    from .raw_attention import RawAttention

__all__ = ["Chefer", "Glimpse", "GlimpseOptions", "LvlmInterpret", "Method", "RawAttention", "find"]

_HOMES = {
    "Chefer": ".chefer",
    "Glimpse": ".glimpse",
    "GlimpseOptions": ".glimpse_options",
    "LvlmInterpret": ".lvlm_interpret",
    "Method": "._base",
    "RawAttention": ".raw_attention",
}


def find(name: str) -> type[Method]:
    """Import the class of a method that `relevancy_rows` can run.

    Raises:
        ArgumentError: no such method has this name.

    Example:
        >>> find("chefer").__name__
        'Chefer'
    """
    sweeping = registry.names(lambda traits: traits.sweeps)
    if name not in sweeping:
        raise ArgumentError(f"method: expected one of {', '.join(sweeping)}, got {name!r}")
    found: type[Method] = registry.find(name).load()
    return found


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
