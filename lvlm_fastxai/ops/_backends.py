"""What the backends of every operator have in common: why one cannot serve a call, and how torch learns of it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from lvlm_fastxai import _native
from lvlm_fastxai.errors import NotDifferentiableError
from lvlm_fastxai.ops import _dispatch

TRITON_KERNELS = "lvlm_fastxai.triton_kernels"
SIXTEEN_AND_32_BIT = (torch.float32, torch.bfloat16, torch.float16)


def register(operator: str, schema: str, dense: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make an operator known to torch and to the dispatch.

    Gives torch the schemas (the native one when the library has not), shape inference and a backward that says no. The
    Triton kernels, ``lvlm_fastxai.triton_kernels.<operator>.<operator>``, are an operator of their own, since both may
    serve tensors of the same device.

    Args:
        operator: name of the operator.
        schema: its arguments and results, as csrc/schema.cpp has them.
        dense: the twin, called with the operator's arguments.
        fake: results without data, for the same arguments.
    """

    def run_triton(*arguments: Any) -> Any:
        return getattr(triton_kernels(operator), operator)(*arguments)

    def raise_on_backward(ctx: Any, *grads: Any) -> None:
        raise NotDifferentiableError(
            f"{operator} is not differentiable: detach its result, or call it under torch.no_grad()"
        )

    class DenseWithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return dense(*arguments)

        backward = staticmethod(raise_on_backward)

    names = f"lvlm_fastxai::{operator}", f"lvlm_fastxai::{operator}_triton"
    if _native.load() is not None:
        torch.library.define(names[0], schema)
        torch.library.impl(names[0], "CompositeExplicitAutograd", dense)
    torch.library.define(names[1], schema)
    torch.library.impl(names[1], "CompositeExplicitAutograd", run_triton)
    for name in names:
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, raise_on_backward)
    native, triton = (getattr(torch.ops.lvlm_fastxai, name.partition("::")[2]).default for name in names)
    _dispatch.register(
        operator,
        {
            "cuda": _dispatch.Backend(cuda_supports, native),
            "triton": _dispatch.Backend(functools.partial(triton_supports, operator), triton, triton_volunteers),
            "cpu": _dispatch.Backend(cpu_supports, native),
            "reference": _dispatch.Backend(lambda problem: None, DenseWithoutGradient.apply),
        },
    )


def cpu_supports(problem: _dispatch.Problem | None) -> str | None:
    if _native.load() is not None:
        return _native.load()
    if problem is None:
        return None
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}"
    if problem.dtype not in SIXTEEN_AND_32_BIT:
        return f"{problem.dtype} is served by the reference only"
    return None


def cuda_supports(problem: _dispatch.Problem | None) -> str | None:
    if _native.load() is not None:
        return _native.load()
    built_for = _native.build_info().get("cuda_architectures", ())
    if not built_for:
        return "not built with CUDA kernels"
    if not torch.cuda.is_available():
        return "no CUDA device"
    device = torch.device("cuda") if problem is None else problem.device
    if device.type != "cuda":
        return f"the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code of one generation runs on every later minor version of it.
    if not any(built // 10 == major and built % 10 <= minor for built in built_for):
        return f"built for compute capabilities {list(built_for)}, the device has {major}{minor}"
    if problem is not None and problem.dtype not in SIXTEEN_AND_32_BIT:
        return f"{problem.dtype} is served by the reference only"
    return None


@functools.cache
def triton_kernels(operator: str) -> ModuleType:
    return importlib.import_module(f"{TRITON_KERNELS}.{operator}")


@functools.cache
def _triton_is_missing(operator: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(TRITON_KERNELS) is None:
        return "the Triton kernels are not installed"
    if importlib.util.find_spec(f"{TRITON_KERNELS}.{operator}") is None:
        return "there is no Triton kernel"
    return None


@functools.cache
def _triton_does_not_load(operator: str) -> str | None:
    try:
        triton_kernels(operator)
    except Exception as error:  # an import of triton runs its drivers' set-up, which raises what it likes
        return f"triton does not load: {type(error).__name__}: {error}"
    return None


def triton_supports(operator: str, problem: _dispatch.Problem | None) -> str | None:
    if _triton_is_missing(operator) is not None:
        return _triton_is_missing(operator)
    interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if problem is not None and problem.device.type not in ("cuda", "cpu"):
        return f"the tensors are on {problem.device}"
    if problem is not None and problem.dtype not in SIXTEEN_AND_32_BIT:
        return f"{problem.dtype} is served by the reference only"
    if not interpreting:
        hint = "; TRITON_INTERPRET=1, set before Python starts, runs the kernels in Triton's interpreter"
        if problem is not None and problem.device.type == "cpu":
            return f"the tensors are on cpu{hint}"
        if not torch.cuda.is_available():
            return f"no CUDA device{hint}"
        if torch.version.hip is not None:
            return "not tried on ROCm"
        capability = torch.cuda.get_device_capability(None if problem is None else problem.device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 or later, the device has {capability[0]}.{capability[1]}"
    # Last, since importing triton takes a second.
    if _triton_does_not_load(operator) is not None:
        return _triton_does_not_load(operator)
    if triton_kernels(operator).is_interpreted() != interpreting:
        return "TRITON_INTERPRET was changed after triton was imported"
    if interpreting and problem is not None and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def triton_volunteers(problem: _dispatch.Problem) -> bool:
    # The interpreter is for tests: a thousand times slower than any other backend.
    return problem.device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
