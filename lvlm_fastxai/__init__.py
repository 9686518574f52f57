"""Explanations of large vision-language models at the price of a backward pass.

Names are imported when first used, so that ``import lvlm_fastxai`` loads neither torch nor the native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, families, fastrm, methods, ops, review, tiny
    from .explain.aggregation import Aggregate, Aggregator, aggregate
    from .explain.explainer import Explainer
    from .explain.explanation import Explanation
    from .explain.relevancy_rows import RelevancyRows, explain_rows, relevancy_rows
    from .fastrm.head import FastRM, FastRMConfig
    from .fastrm.live import LiveMaps
    from .methods.glimpse_options import GlimpseOptions
    from .ops import use_backend
    from .tiny import load_tiny_lvlm

__version__ = "0.1.0"

_HOMES = {
    "Aggregate": ".explain.aggregation",
    "Aggregator": ".explain.aggregation",
    "Explainer": ".explain.explainer",
    "Explanation": ".explain.explanation",
    "FastRM": ".fastrm.head",
    "FastRMConfig": ".fastrm.head",
    "GlimpseOptions": ".methods.glimpse_options",
    "LiveMaps": ".fastrm.live",
    "RelevancyRows": ".explain.relevancy_rows",
    "aggregate": ".explain.aggregation",
    "explain_rows": ".explain.relevancy_rows",
    "load_tiny_lvlm": ".tiny",
    "relevancy_rows": ".explain.relevancy_rows",
    "use_backend": ".ops",
}
_MODULES = ("errors", "families", "fastrm", "methods", "ops", "review", "tiny")

__all__ = [
    "Aggregate",
    "Aggregator",
    "Explainer",
    "Explanation",
    "FastRM",
    "FastRMConfig",
    "GlimpseOptions",
    "LiveMaps",
    "RelevancyRows",
    "aggregate",
    "errors",
    "explain_rows",
    "families",
    "fastrm",
    "load_tiny_lvlm",
    "methods",
    "ops",
    "relevancy_rows",
    "review",
    "tiny",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
