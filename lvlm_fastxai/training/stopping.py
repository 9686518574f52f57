"""Stop a long run between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
from typing import Any


class Stop:
    """Inside its ``with`` block, SIGTERM and an interrupt set ``asked`` instead of ending the process.

    The run looks at ``asked`` between two steps, saves its state and ends. For the main thread only.

    Example:
        >>> import os, signal
        >>> with Stop() as stop:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     print(stop.asked)
        True
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.getsignal(number)
            signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, *_: object) -> None:
        self.asked = True
