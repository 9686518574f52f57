"""The FastRM head, which predicts relevancy maps from the hidden states of the image columns.

Names are imported when first used, so that importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .head import FastRM, FastRMConfig, Prediction
    from .live import LiveMaps, LiveStep, LiveToken, stream

__all__ = ["FastRM", "FastRMConfig", "LiveMaps", "LiveStep", "LiveToken", "Prediction", "stream"]

_HOMES = {
    **dict.fromkeys(("FastRM", "FastRMConfig", "Prediction"), ".head"),
    **dict.fromkeys(("LiveMaps", "LiveStep", "LiveToken", "stream"), ".live"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
