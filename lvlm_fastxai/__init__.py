"""Explanations of large vision-language models at the price of a backward pass."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("lvlm_fastxai.ops")
    if name == "use_backend":
        return importlib.import_module("lvlm_fastxai.ops").use_backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
