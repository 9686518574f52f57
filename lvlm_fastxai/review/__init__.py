"""Accept an answer or have a person look at it: a calibrated policy, a queue, and a page to work through it.

Importing this module loads neither torch nor numpy; its names are loaded when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import Answers, Calibration, calibrate, check
    from .policy import Decision, Policy
    from .queue import Applied, Queue, Record, apply

__all__ = [
    "Answers",
    "Applied",
    "Calibration",
    "Decision",
    "Policy",
    "Queue",
    "Record",
    "apply",
    "calibrate",
    "check",
]

_HOME = {
    "Answers": "calibration",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "check": "calibration",
    "Decision": "policy",
    "Policy": "policy",
    "Applied": "queue",
    "Queue": "queue",
    "Record": "queue",
    "apply": "queue",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
