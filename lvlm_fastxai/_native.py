"""Loads the compiled library `_C`, once and on demand, and remembers why it could not."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import os
from pathlib import Path
from typing import Any

NO_EXTENSION_VARIABLE = "LVLM_FASTXAI_NO_EXT"


def is_switched_off() -> bool:
    """True when the environment asks for pure Python."""
    return os.environ.get(NO_EXTENSION_VARIABLE, "0") not in ("", "0")


def library_path() -> Path | None:
    """The compiled library beside this file, or None when it was not built."""
    for suffix in (*importlib.machinery.EXTENSION_SUFFIXES, ".dylib", ".dll"):
        path = Path(__file__).with_name("_C" + suffix)
        if path.exists():
            return path
    return None


@functools.cache
def load() -> str | None:
    """Load the native operators into torch.

    Returns:
        None when they are loaded, else the reason why they are not. Decided once per process.
    """
    if is_switched_off():
        return f"switched off by {NO_EXTENSION_VARIABLE}"
    path = library_path()
    if path is None:
        return "not built (install with a C++ compiler present, or run `python setup.py build_ext --inplace`)"
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    return None


@functools.cache
def build_info() -> dict[str, Any]:
    """What was built: compiler, instruction sets, CUDA architectures, stable-ABI target. Empty when not built."""
    if is_switched_off():
        return {}
    try:
        module = importlib.import_module("lvlm_fastxai._build_info")
    except ImportError:
        return {}
    return dict(module.build_info())
