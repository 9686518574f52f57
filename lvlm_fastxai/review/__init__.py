"""Accept an answer or have a person look at it: a calibrated policy, a queue, and a page to work through it.

Importing this module loads neither torch nor numpy; its names are loaded when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Answers
    from .calibration import Calibration, calibrate, check
    from .export import backup
    from .features import FEATURES, Feature
    from .items import Record, Shown
    from .policy import Decision, Identity, Policy
    from .queue import Applied, Queue, apply

_HOME = {
    "Answers": "answers",
    "Applied": "queue",
    "Calibration": "calibration",
    "Decision": "policy",
    "FEATURES": "features",
    "Feature": "features",
    "Identity": "policy",
    "Policy": "policy",
    "Queue": "queue",
    "Record": "items",
    "Shown": "items",
    "apply": "queue",
    "backup": "export",
    "calibrate": "calibration",
    "check": "calibration",
}

__all__ = [
    "FEATURES",
    "Answers",
    "Applied",
    "Calibration",
    "Decision",
    "Feature",
    "Identity",
    "Policy",
    "Queue",
    "Record",
    "Shown",
    "apply",
    "backup",
    "calibrate",
    "check",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
