"""One lock for each model: callers that prepare a model, or generate with it, take turns."""

from __future__ import annotations

import contextlib
import threading
import weakref

from torch import nn

from .decoder import unwrap

_locks: weakref.WeakKeyDictionary[nn.Module, contextlib.AbstractContextManager[bool]] = weakref.WeakKeyDictionary()
_table = threading.Lock()


def holding(model: nn.Module) -> contextlib.AbstractContextManager[bool]:
    """Keep every other thread from preparing or running ``model`` inside the ``with`` block; they queue.

    Wrappers of one model (PEFT, torch.compile, the language model of a vision-language model) share its lock. The same
    thread may hold it more than once. Two different models never wait for each other. A lock lives as long as its
    model.

    Args:
        model: any module. What a wrapper adds of its own is not looked at.

    Returns:
        A context manager: a re-entrant lock, which no interrupt leaves held.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> with holding(model), holding(torch.compile(model)):
        ...     pass
    """
    key = _key(model)
    with _table:
        lock = _locks.get(key)
        if lock is None:
            lock = _locks[key] = threading.RLock()
        return lock


def _key(model: nn.Module) -> nn.Module:
    """The module that all views of one model share: the language model, where there is one."""
    inside = unwrap(model)
    get_decoder = getattr(inside, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    return unwrap(decoder) if isinstance(decoder, nn.Module) else inside
