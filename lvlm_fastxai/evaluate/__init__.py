"""Are the maps right? Scores them against pixels that are known to decide the answer.

Importing this package loads neither torch nor a model; `evaluate` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import Evaluation, Settings, evaluate

__all__ = ["Evaluation", "Settings", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
