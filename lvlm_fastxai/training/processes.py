"""The processes that share a long run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import ArgumentError, FastXAIError, one_line

# How long a process waits for the slowest of the others at the end; a dead one is noticed at once.
PATIENCE = timedelta(days=7)

Decided = TypeVar("Decided")


def join_processes(device_type: str) -> Any:
    """Join the processes that ``torchrun`` or ``accelerate launch`` has started; this one alone without them.

    Args:
        device_type: "cpu", "cuda", …: what the processes will compute on.

    Returns:
        `accelerate.PartialState`: rank, number of processes, this process's device.

    Raises:
        ArgumentError: accelerate is not installed.
    """
    try:
        from accelerate import PartialState
    except ImportError:
        raise ArgumentError("training and maps need accelerate: pip install 'lvlm_fastxai[fastrm]'") from None
    return PartialState(cpu=device_type == "cpu", timeout=PATIENCE)


def agree(state: Any, decide: Callable[[], Decided]) -> Decided:
    """Let the first process decide, and give its decision to all of them.

    Args:
        state: of `join_processes`.
        decide: called on the first process alone; what it returns must be picklable.

    Raises:
        FastXAIError: what ``decide`` raised, on every process; an OSError as ArgumentError.
    """
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    if state.is_main_process:
        try:
            told[0] = decide()
        except FastXAIError as error:
            told[1] = error
        except OSError as error:
            told[1] = ArgumentError(one_line(error))
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    decided: Decided = told[0]
    return decided


def own_device(device: str, state: Any) -> str:
    """The device of this process, where several were started for ``device``.

    Raises:
        ArgumentError: several processes, and a device that names one of many ("cuda:1").
    """
    if state.num_processes == 1 or device == "cpu":
        return device
    kind, _, number = device.partition(":")
    if number:
        raise ArgumentError(f"--device: expected '{kind}' for several processes, got '{device}'")
    return str(state.device)
