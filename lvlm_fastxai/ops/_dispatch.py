"""Choice of backend: the first that can serve a call runs. A backend that was asked for by name never falls back."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from lvlm_fastxai.choices import BackendName
from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError

# In the order in which they are tried.
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
BACKEND_VARIABLE = "LVLM_FASTXAI_BACKEND"

_requested: contextvars.ContextVar[BackendName | None] = contextvars.ContextVar("lvlm_fastxai_backend", default=None)


@dataclass(frozen=True)
class Problem:
    """What a backend may look at when it decides whether it can serve a call. No sizes: they may be symbolic."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `supports(problem)` returns None or the reason against it; `supports(None)` asks about this machine in general.
    `volunteers(problem)` is False for a backend that serves only those who ask for it by name.
    """

    supports: Callable[[Problem | None], str | None]
    run: Callable[..., Any]
    volunteers: Callable[[Problem], bool] = lambda problem: True


@dataclass(frozen=True)
class Operator:
    """One entry of `catalogue`.

    Attributes:
        name: the operator's name, which is also the name of its file in every room.
        kind: what its arguments describe, such as "attention". Operators of one kind share checks and test cases.
        backends: its implementations, in the order in which they are tried.
        differentiable: whether a gradient formula is registered.
        composed_of: the operator whose kernels it calls, where it has none of its own.

    Example:
        >>> import lvlm_fastxai as fx
        >>> operator = fx.ops.catalogue()["relevancy_product"]
        >>> operator.kind, list(operator.backends)
        ('attention', ['cuda', 'triton', 'cpu', 'reference'])
    """

    name: str
    kind: str
    backends: Mapping[BackendName, Backend]
    differentiable: bool = False
    composed_of: str | None = None


_operators: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    """Make an operator known; its backends are put in the order in which they are tried."""
    ordered = {name: operator.backends[name] for name in BACKENDS if name in operator.backends}
    _operators[operator.name] = replace(operator, backends=ordered)


def catalogue() -> dict[str, Operator]:
    """Return every operator by its name, sorted.

    Example:
        >>> import lvlm_fastxai as fx
        >>> fx.ops.catalogue()["glimpse_product"].composed_of
        'relevancy_product'
    """
    return dict(sorted(_operators.items()))


def operators() -> tuple[str, ...]:
    """Return the names of all operators that have kernels of their own.

    Example:
        >>> import lvlm_fastxai as fx
        >>> "relevancy_product" in fx.ops.operators(), "glimpse_product" in fx.ops.operators()
        (True, False)
    """
    return tuple(name for name, operator in catalogue().items() if operator.composed_of is None)


def backends(operator: str) -> dict[BackendName, str | None]:
    """Say which backends of an operator can be used on this machine.

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
    return {name: backend.supports(None) for name, backend in _operators[operator].backends.items()}


def _check_name(name: str, source: str) -> BackendName:
    for known in BACKENDS:
        if name == known:
            return known
    raise ArgumentError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")


@contextlib.contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
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


def requested_backend() -> BackendName | None:
    """Return the backend asked for by `use_backend`, else by the environment, else None."""
    name = _requested.get()
    if name is None:
        variable = os.environ.get(BACKEND_VARIABLE)
        return _check_name(variable, BACKEND_VARIABLE) if variable else None
    return name


# Decided once at trace time under torch.compile, which can follow neither context variables nor the file system.
@torch.compiler.assume_constant_result
def chosen_backend(
    operator: str, device: torch.device, dtype: torch.dtype, backend: BackendName | None = None
) -> BackendName:
    """Return the name of the backend that would serve a call.

    Raises:
        ArgumentError: there is no backend of that name.
        BackendUnavailableError: the backend that was asked for cannot serve the call.

    Example:
        >>> import lvlm_fastxai as fx
        >>> with fx.use_backend("reference"):
        ...     fx.ops.chosen_backend("relevancy_product", torch.device("cpu"), torch.float32)
        'reference'
    """
    problem = Problem(device, dtype)
    implementations = _operators[operator].backends
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


def select(operator: str, leading: Tensor, backend: BackendName | None = None) -> Callable[..., Any]:
    """Return the implementation that is to serve a call, judged by the device and dtype of its leading tensor.

    Raises:
        ArgumentError: there is no backend of that name.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
    """
    name = chosen_backend(operator, leading.device, leading.dtype, backend)
    return _operators[operator].backends[name].run
