"""The processes that share a long run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from ..errors import ArgumentError

# How long a process waits for the slowest of the others at the end; a dead one is noticed at once.
PATIENCE = timedelta(days=7)


def join_processes(device_type: str) -> Any:
    """`accelerate.PartialState`: the processes that ``torchrun`` or ``accelerate launch`` has started, or this one.

    Raises:
        ArgumentError: accelerate is not installed.
    """
    try:
        from accelerate import PartialState
    except ImportError:
        raise ArgumentError("distillation needs accelerate: pip install 'lvlm_fastxai[fastrm]'") from None
    return PartialState(cpu=device_type == "cpu", timeout=PATIENCE)
