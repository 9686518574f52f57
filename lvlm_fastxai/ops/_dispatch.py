"""Choice of backend: the first that has no reason against a problem runs; one that was asked for never falls back."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError

BACKENDS = ("cuda", "triton", "cpu", "reference")
BACKEND_VARIABLE = "LVLM_FASTXAI_BACKEND"

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("lvlm_fastxai_backend", default=None)


@dataclass(frozen=True)
class Problem:
    """What a backend may look at when it decides whether it can serve a call. No sizes: they may be symbolic."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `supports(problem)` returns None or the reason against it; `supports(None)` asks about this machine in general.
    `volunteers(problem)` is False where it serves only who asks for it by name.
    """

    supports: Callable[[Problem | None], str | None]
    run: Callable[..., Any]
    volunteers: Callable[[Problem], bool] = lambda problem: True


_operators: dict[str, dict[str, Backend]] = {}


def register(operator: str, implementations: dict[str, Backend]) -> None:
    """Make the implementations of an operator known, keyed by backend name."""
    _operators[operator] = {name: implementations[name] for name in BACKENDS if name in implementations}


def operators() -> tuple[str, ...]:
    """Names of all operators."""
    return tuple(sorted(_operators))


def backends(operator: str) -> dict[str, str | None]:
    """Which backends of an operator can be used on this machine.

    Args:
        operator: name of the operator, such as "relevancy_product".

    Returns:
        Backend name → None when usable, else the reason why not, in the order in which they are tried.

    Raises:
        ArgumentError: no operator has that name.

    Example:
        >>> import lvlm_fastxai as fx
        >>> fx.ops.backends("relevancy_product")["reference"] is None
        True
    """
    if operator not in _operators:
        raise ArgumentError(f"backends: `operator` must be one of {sorted(_operators)}, got {operator!r}")
    return {name: backend.supports(None) for name, backend in _operators[operator].items()}


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ArgumentError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator called inside on one backend; a call it cannot serve raises instead of falling back.

    Args:
        name: "reference", "cpu", "cuda" or "triton".

    Raises:
        ArgumentError: there is no such backend.

    Example:
        >>> import lvlm_fastxai as fx
        >>> with fx.use_backend("reference"):
        ...     pass
    """
    token = _requested.set(_check_name(name, "use_backend: `name`"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str | None:
    """The backend asked for by `use_backend`, else by the environment, else None."""
    name = _requested.get()
    if name is None:
        name = os.environ.get(BACKEND_VARIABLE) or None
        if name is not None:
            _check_name(name, BACKEND_VARIABLE)
    return name


# Decided once at trace time under torch.compile, which can follow neither context variables nor the file system.
@torch.compiler.assume_constant_result
def chosen_backend(operator: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """Name of the backend that would serve a call.

    Raises:
        ArgumentError: there is no backend of that name.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
    """
    problem = Problem(device, dtype)
    implementations = _operators[operator]
    name = requested_backend() if backend is None else _check_name(backend, f"{operator}: `backend`")
    if name is None:
        for candidate, implementation in implementations.items():
            if implementation.volunteers(problem) and implementation.supports(problem) is None:
                return candidate
        raise BackendUnavailableError(f"{operator}: no backend serves {problem}")
    if name not in implementations:
        raise BackendUnavailableError(f"{operator}: backend {name!r} is not implemented")
    reason = implementations[name].supports(problem)
    if reason is not None:
        raise BackendUnavailableError(f"{operator}: backend {name!r} is unavailable: {reason}")
    return name


def select(operator: str, query: Tensor, backend: str | None = None) -> Callable[..., Any]:
    """The implementation that is to serve a call, judged by its query tensor.

    Raises:
        ArgumentError: there is no backend of that name.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
    """
    name = chosen_backend(operator, query.device, query.dtype, backend)
    return _operators[operator][name].run
