"""The versions that an explanation was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Name the versions of this package, torch, transformers and Python.

    Example:
        >>> sorted(versions())
        ['lvlm_fastxai', 'python', 'torch', 'transformers']
    """
    found = {}
    for name in ("lvlm_fastxai", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            from .. import __version__

            found[name] = __version__
    return {**found, "python": platform.python_version()}
