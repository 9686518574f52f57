"""Changes to a model that are always undone: whatever is raised, and whenever Ctrl-C is pressed.

Two things make that true. Every undo is registered before the change that it undoes. And an interrupt that comes while
a model is changed or restored waits until that is done. Python may deliver an interrupt at the first instruction of a
function, before any ``try`` in it is entered. So the handler looks at the stack, and waits while a :func:`shielded`
function is on it.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .lock import holding

P = ParamSpec("P")
R = TypeVar("R")


def shielded(function: Callable[P, R]) -> Callable[P, R]:
    """Let no interrupt into ``function`` while a :class:`Guard` is open in the main thread; deliver it afterwards."""

    @functools.wraps(function)
    def shield(*args: P.args, **kwargs: P.kwargs) -> R:
        done = False
        try:
            return function(*args, **kwargs)
        finally:
            done = True  # noqa: F841 -- read by the handler: an interrupt is raised at once now, so that none is forgotten
            _interrupts.deliver()

    return shield


_SHIELD = shielded(print).__code__


def _is_shielded(frame: FrameType | None) -> bool:
    """Whether a shielded function that is not done is on the stack."""
    while frame is not None:
        if frame.f_code is _SHIELD and not frame.f_locals.get("done"):
            return True
        frame = frame.f_back
    return False


class _Interrupts:
    """The handler of SIGINT while guards are open in the main thread, the only one that Python interrupts."""

    def __init__(self) -> None:
        self._waiting = False
        self._open = 0
        self._before: Any = None

    def watch(self) -> None:
        """Take SIGINT over, if it raises something in Python."""
        if threading.current_thread() is threading.main_thread():
            if self._open == 0:
                self._waiting = False
                self._before = signal.getsignal(signal.SIGINT)
                if callable(self._before):
                    signal.signal(signal.SIGINT, self._handle)
            self._open += 1

    def unwatch(self) -> None:
        """Give SIGINT back, unless somebody else has taken it meanwhile."""
        if threading.current_thread() is threading.main_thread():
            self._open -= 1
            if self._open == 0 and signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._waiting = _is_shielded(frame)
        if not self._waiting:
            self._before(number, frame)

    def deliver(self) -> None:
        """Raise what has waited, if nothing is shielded any more."""
        if self._waiting and threading.current_thread() is threading.main_thread():
            self._handle(signal.SIGINT, sys._getframe())


_interrupts = _Interrupts()


class Undo:
    """Undoes what was changed, last change first. Closing it twice does nothing more.

    A ``with`` statement of its own would leave a gap between the two: open and close it in a ``try``, as
    :class:`~lvlm_fastxai.sweep.forward.Sweep` does.

    Example:
        >>> model, undo = nn.Linear(2, 2), Undo()
        >>> try:
        ...     undo.on_close(model.train)
        ...     _ = model.eval()
        ... finally:
        ...     undo.close()
        >>> model.training
        True
    """

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()

    def on_close(self, undo: Callable[..., object], *arguments: Any) -> None:
        """Register an undo, before the change that it undoes."""
        self._undo.callback(undo, *arguments)

    @shielded
    def hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        """Register a hook on a module, by a method such as ``module.register_forward_hook``, until this is closed."""
        handles: list[Any] = []
        self.on_close(lambda: [handle.remove() for handle in handles])
        handles.append(register(hook, **options))

    @shielded
    def close(self) -> None:
        """Undo everything; an undo that raises does not keep the others from running."""
        self._undo.close()


class Guard(Undo):
    """An :class:`Undo` that holds a model's lock while it is open, and puts torch's gradient mode back.

    Args:
        model: other threads that want it wait.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._lock: Any = holding(model)

    def open(self) -> None:
        """Wait for the model's lock, and hold it."""
        with self._lock:  # waits without a shield: Ctrl-C ends the waiting
            self._hold()

    @shielded
    def _hold(self) -> None:
        _interrupts.watch()
        self.on_close(_interrupts.unwatch)
        self._lock.acquire()  # at once, since this thread has it
        self.on_close(self._lock.release)
        self.on_close(torch.set_grad_enabled, torch.is_grad_enabled())
