"""What the backends of every operator have in common: why one cannot serve a call, and how torch learns of it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from lvlm_fastxai import _native
from lvlm_fastxai.choices import BackendName
from lvlm_fastxai.errors import NotDifferentiableError
from lvlm_fastxai.ops import _dispatch
from lvlm_fastxai.ops._dispatch import BACKENDS, Backend, Operator, Problem

TRITON_KERNELS = "lvlm_fastxai.triton_kernels"
SIXTEEN_AND_32_BIT = (torch.float32, torch.bfloat16, torch.float16)


def register(
    operator: str,
    schema: str,
    dense: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    kind: str,
    backends: Sequence[BackendName] = BACKENDS,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Make an operator known to torch and to the dispatch.

    Gives torch the schema, shape inference and a backward. Native kernels, csrc/cpu/<operator>.cpp and
    csrc/cuda/<operator>.cu, implement `lvlm_fastxai::<operator>`. The Triton kernels,
    `lvlm_fastxai.triton_kernels.<operator>.<operator>`, are an operator of their own, since both may serve tensors of
    the same device.

    Args:
        operator: name of the operator.
        schema: its arguments and results, in torch's schema language.
        dense: the twin, called with the operator's arguments.
        fake: results without data, for the same arguments.
        kind: what its arguments describe; see `Operator.kind`.
        backends: those that it has. The others are not offered.
        setup_context: called as `setup_context(ctx, inputs, output)` after a forward that needs a gradient, to save
            what `backward` needs. `ctx.backend` names the backend that ran, for operators that `backward` calls.
        backward: the gradient's formula, called as `backward(ctx, *grads)`; it returns one gradient, or None, for each
            argument. It serves every backend, the twin too. Default: a backward that raises.

    See docs/extending.md, which goes through an operator with a backward.
    """
    formula = Formula(operator, setup_context, backward)
    native, triton = f"lvlm_fastxai::{operator}", f"lvlm_fastxai::{operator}_triton"
    # A library that was built before schemas stood in Python alone brings its own along.
    if not hasattr(torch.ops.lvlm_fastxai, operator):
        torch.library.define(native, schema)
    if _native.load() is not None or not {"cpu", "cuda"} & set(backends):
        torch.library.impl(native, "CompositeExplicitAutograd", dense)
        formula.attach(native, lambda inputs: "reference")
    else:
        formula.attach(native, lambda inputs: "cuda" if inputs[0].is_cuda else "cpu")
    implementations = {
        "cuda": Backend(functools.partial(cuda_supports, operator), _overload(native)),
        "cpu": Backend(functools.partial(cpu_supports, operator), _overload(native)),
        "reference": Backend(lambda problem: None, formula.around(dense)),
    }
    torch.library.register_fake(native, fake)
    if "triton" in backends:
        torch.library.define(triton, schema)
        torch.library.impl(triton, "CompositeExplicitAutograd", lambda *arguments: _triton_kernel(operator)(*arguments))
        torch.library.register_fake(triton, fake)
        formula.attach(triton, lambda inputs: "triton")
        implementations["triton"] = Backend(
            functools.partial(triton_supports, operator), _overload(triton), triton_volunteers
        )
    offered = {name: implementations[name] for name in backends}
    _dispatch.register(Operator(operator, kind, offered, differentiable=backward is not None))


def compose(operator: str, of: str) -> None:
    """Make an operator known that consists of calls of another one, whose kind and backends it has."""
    part = _dispatch.catalogue()[of]
    _dispatch.register(Operator(operator, part.kind, part.backends, part.differentiable, composed_of=of))


class Formula:
    """The gradient of one operator, attached to each of its implementations."""

    def __init__(
        self,
        operator: str,
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None,
        backward: Callable[..., Any] | None,
    ) -> None:
        self.operator = operator
        self.save = setup_context
        self.backward = backward or self.refuse

    def refuse(self, ctx: Any, *grads: Any) -> None:
        raise NotDifferentiableError(
            f"{self.operator} is not differentiable: detach its result, or call it under torch.no_grad()"
        )

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any, backend: BackendName) -> None:
        ctx.backend = backend
        if self.save is not None:
            self.save(ctx, inputs, output)

    def attach(self, name: str, backend_of: Callable[[tuple[Any, ...]], BackendName]) -> None:
        """Differentiate torch's operator of that name; `backend_of(inputs)` names the backend that runs."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self.setup(ctx, inputs, output, backend_of(inputs))

        torch.library.register_autograd(name, self.backward, setup_context=setup_context)

    def around(self, dense: Callable[..., Any]) -> Callable[..., Any]:
        """Return the twin with this gradient in the place of autograd's own."""
        setup, backward = self.setup, self.backward

        class Dense(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = dense(*arguments)
                setup(ctx, arguments, output, "reference")
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        return Dense.apply


def _overload(name: str) -> Any:
    return getattr(torch.ops.lvlm_fastxai, name.partition("::")[2]).default


def _triton_kernel(operator: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(triton_kernels(operator), operator)
    return kernel


@functools.cache
def native_kernel_is_missing(operator: str, key: str) -> str | None:
    """Say why the native library cannot run an operator on a device ("CPU" or "CUDA"); None when it can."""
    if _native.load() is not None:
        return _native.load()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lvlm_fastxai::{operator}", key):
        return f"the native library was built without a {key} kernel for it"
    return None


def cpu_supports(operator: str, problem: Problem | None) -> str | None:
    if native_kernel_is_missing(operator, "CPU") is not None:
        return native_kernel_is_missing(operator, "CPU")
    if problem is None:
        return None
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}"
    if problem.dtype not in SIXTEEN_AND_32_BIT:
        return f"{problem.dtype} is served by the reference only"
    return None


def cuda_supports(operator: str, problem: Problem | None) -> str | None:
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
    return native_kernel_is_missing(operator, "CUDA")


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


def triton_supports(operator: str, problem: Problem | None) -> str | None:
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


def triton_volunteers(problem: Problem) -> bool:
    # The interpreter is for tests: a thousand times slower than any other backend.
    return problem.device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
