"""The product of a relevancy row with the head-averaged, rectified attention-gradient of one layer."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lvlm_fastxai import _native
from lvlm_fastxai.errors import ArgumentError, NotDifferentiableError
from lvlm_fastxai.ops import _dispatch
from lvlm_fastxai.ops.key_ranges import key_ranges as make_key_ranges
from lvlm_fastxai.reference.relevancy_product import relevancy_product as dense

OPERATOR = "relevancy_product"
# Beside the native one, since both may serve tensors of the same device.
TRITON_OPERATOR = "relevancy_product_triton"
TRITON_KERNELS = "lvlm_fastxai.triton_kernels"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor row, "
    "Tensor key_start, Tensor key_end, float scale) -> Tensor"
)
SIXTEEN_AND_32_BIT = (torch.float32, torch.bfloat16, torch.float16)


def relevancy_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    row: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """row @ mean_h max(0, dP_h ∘ P_h) without ever storing an S×S tensor.

    One layer of the self-attention rule of Chefer, Gur and Wolf, "Generic Attention-model Explainability"
    (ICCV 2021), eq. 5, for a single row of R, with P_ij = exp(scale·q_i·k_j − logsumexp_i) and dP_ij = dO_i·v_j.
    The caller adds the result to `row`. Hidden keys and rows of weight zero contribute nothing.

    Args:
        query: (B, H, Sq, d) after rotary embedding; float32, bfloat16, float16 or float64.
        key, value: (B, Hkv, Sk, d), un-repeated; head h uses key/value head h // (H / Hkv).
        grad_output: (B, N, H, Sq, d), gradient of each of N targets at the attention output P·V, or (B, 1, H, Sq, d)
            to apply one gradient to all N rows.
        logsumexp: (B, H, Sq) of the masked, scaled scores; float32 (float64 with float64 inputs). Ignored for rows
            that see no key.
        row: (B, N, Sq) relevancy of the query rows, float32 (float64 with float64 inputs).
        scale: softmax scale; default d**-0.5.
        causal: a row at position i sees keys j ≤ i only.
        window: sliding window counting the row itself: i − window < j ≤ i, or |i − j| < window when not causal.
        query_positions: (B, Sq) increasing integers, where the rows stand among the keys; default the last Sq.
        lengths: (B,) number of real keys (padding on the right) or (B, 2) half-open range of the real keys.
        key_ranges: (B, Sq, 2) integers, half-open range of keys that each row sees; replaces causal, window,
            query_positions and lengths. See `lvlm_fastxai.ops.key_ranges`.
        backend: "cuda", "triton", "cpu" or "reference"; default the first that can serve the call.

    Returns:
        (B, N, Sk), float32 (float64 with float64 inputs). Not differentiable: backward through it raises.

    Raises:
        ArgumentError: a shape, dtype, device or combination of arguments is wrong.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
        NotDifferentiableError: on backward through the result.

    Example:
        >>> import torch, lvlm_fastxai as fx
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> fx.ops.relevancy_product(q, q, q, torch.ones(1, 1, 1, 2, 4), lse, torch.ones(1, 1, 2))
        tensor([[[6., 2.]]])
    """
    _check(query, key, value, grad_output, logsumexp, row)
    batch, _, query_length, head_width = query.shape
    if key_ranges is None:
        key_ranges = make_key_ranges(
            batch,
            query_length,
            key.shape[2],
            causal=causal,
            window=window,
            query_positions=query_positions,
            lengths=lengths,
            device=query.device,
        )
    else:
        _check_ranges(key_ranges, batch, query_length, causal, window, query_positions, lengths)
    if key_ranges.device != query.device:
        _refuse("key_ranges, query_positions and lengths", f"be on {query.device}", key_ranges.device)
    key_start, key_end = key_ranges.to(torch.int32).unbind(-1)

    scale = float(head_width) ** -0.5 if scale is None else float(scale)
    run = _dispatch.select(OPERATOR, query, backend)
    return run(query, key, value, grad_output, logsumexp, row, key_start, key_end, scale)


def _refuse(name: str, expected: str, got: object) -> None:
    raise ArgumentError(f"{OPERATOR}: `{name}` must {expected}, got {got}")


def _check(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, logsumexp: Tensor, row: Tensor) -> None:
    for name, tensor, axes in (
        ("query", query, "(B, H, Sq, d)"),
        ("key", key, "(B, Hkv, Sk, d)"),
        ("value", value, "(B, Hkv, Sk, d)"),
        ("grad_output", grad_output, "(B, N, H, Sq, d)"),
        ("logsumexp", logsumexp, "(B, H, Sq)"),
        ("row", row, "(B, N, Sq)"),
    ):
        if tensor.dim() != axes.count(",") + 1:
            _refuse(name, f"have shape {axes}", tuple(tensor.shape))
        if tensor.device != query.device:
            _refuse(name, f"be on {query.device} like `query`", tensor.device)
    if query.dtype not in (*SIXTEEN_AND_32_BIT, torch.float64):
        _refuse("query", "be float32, bfloat16, float16 or float64", query.dtype)
    for name, tensor in (("key", key), ("value", value), ("grad_output", grad_output)):
        if tensor.dtype != query.dtype:
            _refuse(name, f"have dtype {query.dtype} like `query`", tensor.dtype)
    state_dtype = _state_dtype(query)
    for name, tensor in (("logsumexp", logsumexp), ("row", row)):
        if tensor.dtype != state_dtype:
            _refuse(name, f"have dtype {state_dtype}", tensor.dtype)

    batch, heads, query_length, head_width = query.shape
    _, key_heads, key_length, _ = key.shape
    targets = row.shape[1]
    if head_width == 0:
        _refuse("query", "have a head width of at least 1", tuple(query.shape))
    if heads == 0:
        _refuse("query", "have at least one head", tuple(query.shape))
    if key_heads == 0 or heads % key_heads:
        _refuse("key", f"have a number of heads that divides H = {heads}", key_heads)
    if targets == 0:
        _refuse("row", "hold at least one target", tuple(row.shape))
    for name, tensor, shape in (
        ("key", key, (batch, key_heads, key_length, head_width)),
        ("value", value, (batch, key_heads, key_length, head_width)),
        ("logsumexp", logsumexp, (batch, heads, query_length)),
        ("row", row, (batch, targets, query_length)),
    ):
        if tensor.shape != shape:
            _refuse(name, f"have shape {shape}", tuple(tensor.shape))
    expected = (batch, targets, heads, query_length, head_width)
    if grad_output.shape != expected and grad_output.shape != (batch, 1, *expected[2:]):
        _refuse("grad_output", f"have shape {expected} or {(batch, 1, *expected[2:])}", tuple(grad_output.shape))


def _check_ranges(
    key_ranges: Tensor,
    batch: int,
    query_length: int,
    causal: bool,
    window: int | None,
    query_positions: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if not causal or window is not None or query_positions is not None or lengths is not None:
        raise ArgumentError(
            f"{OPERATOR}: `key_ranges` replaces causal, window, query_positions and lengths; got it together with one"
        )
    if key_ranges.shape != (batch, query_length, 2):
        _refuse("key_ranges", f"have shape (B, Sq, 2) = {(batch, query_length, 2)}", tuple(key_ranges.shape))
    if key_ranges.dtype not in (torch.int32, torch.int64):
        _refuse("key_ranges", "hold int32 or int64", key_ranges.dtype)


def _state_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    row: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
) -> Tensor:
    return row.new_empty((row.shape[0], row.shape[1], key.shape[2]))


def _raise_on_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotDifferentiableError(
        f"{OPERATOR} is not differentiable: detach its result, or call it under torch.no_grad()"
    )


class _DenseWithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        return dense(*arguments)

    backward = staticmethod(_raise_on_backward)


def _run_triton(*arguments: Any) -> Tensor:
    return _triton_kernels().relevancy_product(*arguments)


def _register_torch_operators() -> None:
    """Give torch the schemas (the native one when the library has not), shape inference and a backward that says no."""
    if _native.load() is not None:
        torch.library.define(f"lvlm_fastxai::{OPERATOR}", SCHEMA)
        torch.library.impl(f"lvlm_fastxai::{OPERATOR}", "CompositeExplicitAutograd", dense)
    torch.library.define(f"lvlm_fastxai::{TRITON_OPERATOR}", SCHEMA)
    torch.library.impl(f"lvlm_fastxai::{TRITON_OPERATOR}", "CompositeExplicitAutograd", _run_triton)
    for operator in (OPERATOR, TRITON_OPERATOR):
        torch.library.register_fake(f"lvlm_fastxai::{operator}", _fake)
        torch.library.register_autograd(f"lvlm_fastxai::{operator}", _raise_on_backward)


def _cpu_supports(problem: _dispatch.Problem | None) -> str | None:
    if _native.load() is not None:
        return _native.load()
    if problem is None:
        return None
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}"
    if problem.dtype not in SIXTEEN_AND_32_BIT:
        return f"{problem.dtype} is served by the reference only"
    return None


def _cuda_supports(problem: _dispatch.Problem | None) -> str | None:
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
def _triton_kernels() -> ModuleType:
    return importlib.import_module(f"{TRITON_KERNELS}.{OPERATOR}")


@functools.cache
def _triton_is_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(TRITON_KERNELS) is None:
        return "the Triton kernels are not installed"
    return None


@functools.cache
def _triton_does_not_load() -> str | None:
    try:
        _triton_kernels()
    except Exception as error:  # an import of triton runs its drivers' set-up, which raises what it likes
        return f"triton does not load: {type(error).__name__}: {error}"
    return None


def _triton_supports(problem: _dispatch.Problem | None) -> str | None:
    if _triton_is_missing() is not None:
        return _triton_is_missing()
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
    if _triton_does_not_load() is not None:
        return _triton_does_not_load()
    if _triton_kernels().is_interpreted() != interpreting:
        return "TRITON_INTERPRET was changed after triton was imported"
    if interpreting and problem is not None and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def _triton_volunteers(problem: _dispatch.Problem) -> bool:
    # The interpreter is for tests: a thousand times slower than any other backend.
    return problem.device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")


def _reference_supports(problem: _dispatch.Problem | None) -> str | None:
    return None


_register_torch_operators()
_native_operator = torch.ops.lvlm_fastxai.relevancy_product.default
_triton_operator = torch.ops.lvlm_fastxai.relevancy_product_triton.default
_dispatch.register(
    OPERATOR,
    {
        "cuda": _dispatch.Backend(_cuda_supports, _native_operator),
        "triton": _dispatch.Backend(_triton_supports, _triton_operator, _triton_volunteers),
        "cpu": _dispatch.Backend(_cpu_supports, _native_operator),
        "reference": _dispatch.Backend(_reference_supports, _DenseWithoutGradient.apply),
    },
)
