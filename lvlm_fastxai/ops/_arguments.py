"""What every operator asks of its arguments: axes, devices, dtypes, sizes, and whole numbers that fit in 32 bits.

Checks read no tensor's values, but for those of wide integers on the CPU: on a GPU that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, get_args

import torch
from torch import Tensor

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.ops._backends import SIXTEEN_AND_32_BIT

FLOATING = (*SIXTEEN_AND_32_BIT, torch.float64)
# Kernels count positions in 32 bits.
INT32 = torch.iinfo(torch.int32)
NARROW_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def refuse(operator: str, name: str, expected: str, got: object) -> NoReturn:
    """Raise the error that names an argument, what was expected of it and what came."""
    raise ArgumentError(f"{operator}: `{name}` must {expected}, got {got}")


def check_choice(operator: str, name: str, value: str, choices: object) -> None:
    """Refuse anything that is not one of the strings of a `Literal`."""
    if value not in get_args(choices):
        refuse(operator, name, f"be one of {', '.join(get_args(choices))}", repr(value))


def check_axes(operator: str, tensors: Mapping[str, tuple[Tensor, str]]) -> None:
    """Refuse a tensor with other axes than named, such as "B H Sq d", or on another device than the first one."""
    leader, (leading, _) = next(iter(tensors.items()))
    for name, (tensor, axes) in tensors.items():
        if tensor.dim() != len(axes.split()):
            refuse(operator, name, f"have shape ({', '.join(axes.split())})", tuple(tensor.shape))
        if tensor.device != leading.device:
            refuse(operator, name, f"be on {leading.device} like `{leader}`", tensor.device)


def check_dtypes(operator: str, tensors: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose dtype is not the first one's, and states that are not float32 (float64 beside float64)."""
    leader, leading = next(iter(tensors.items()))
    if leading.dtype not in FLOATING:
        refuse(operator, leader, "be float32, bfloat16, float16 or float64", leading.dtype)
    for name, tensor in tensors.items():
        if tensor.dtype != leading.dtype:
            refuse(operator, name, f"have dtype {leading.dtype} like `{leader}`", tensor.dtype)
    state_dtype = torch.float64 if leading.dtype == torch.float64 else torch.float32
    for name, tensor in states.items():
        if tensor.dtype != state_dtype:
            refuse(operator, name, f"have dtype {state_dtype}", tensor.dtype)


def check_sizes(operator: str, tensors: Mapping[str, tuple[Tensor, str]]) -> dict[str, int]:
    """Refuse a tensor in which an axis has another size than in a tensor before it.

    Returns:
        The size of every named axis.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, axes) in tensors.items():
        expected = tuple(sizes.get(axis, size) for axis, size in zip(axes.split(), tensor.shape, strict=True))
        if tensor.shape != expected:
            refuse(operator, name, f"have shape {expected}", tuple(tensor.shape))
        sizes |= dict(zip(axes.split(), expected, strict=True))
    return sizes


def check_integers(
    operator: str, name: str, tensor: Tensor, shapes: Sequence[tuple[int, ...]], axes: str, device: torch.device
) -> None:
    """Refuse a tensor that is not int32 or int64, of one of the shapes, on the device."""
    if tensor.shape not in shapes:
        refuse(operator, name, f"have shape {axes} = {shapes[0]}", tuple(tensor.shape))
    if tensor.dtype not in (torch.int32, torch.int64):
        refuse(operator, name, "hold int32 or int64", tensor.dtype)
    if tensor.device != device:
        refuse(operator, name, f"be on {device}", tensor.device)


def as_int32(operator: str, name: str, tensor: Tensor) -> Tensor:
    """Convert positions or bounds to int32 without wrapping.

    A value that int32 does not hold is refused on the CPU. Elsewhere, and while a graph is traced, it is moved to the
    nearest one that int32 holds: no sequence is as long, so that a range which is cut there holds the same keys.

    Raises:
        ArgumentError: the tensor does not hold integers, or a value is beyond int32.
    """
    if tensor.dtype in NARROW_INTEGERS:
        return tensor.to(torch.int32)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype in (torch.bool, torch.uint64):
        refuse(operator, name, "hold integers of at most 63 bits", tensor.dtype)
    tensor = tensor.to(torch.int64)
    # Tensors without values (fake, functional) are of types of their own.
    if tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling():
        beyond = tensor[(tensor < INT32.min) | (tensor > INT32.max)]
        if beyond.numel() > 0:
            refuse(operator, name, "hold numbers within int32", beyond[0].item())
    return tensor.clamp(INT32.min, INT32.max).to(torch.int32)
