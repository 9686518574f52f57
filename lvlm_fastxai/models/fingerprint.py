"""Which model a head, a map or a policy belongs to, told by the weights alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from . import SHIPPED

VALUES = 256  # of each parameter: a fine-tuned model differs in nearly all of them, and 7 G parameters need no reading
# fp16's least normal number: below it a bf16 value cast to fp16 would come back changed.
LEAST = 2.0**-14


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell models apart by their weights.

    SHA-256 over the sorted digests of the parameters, each of its shape and of 256 evenly spaced values rounded to
    bf16, those below 2⁻¹⁴ taken as zero. So neither the parameters' names and order count, which transformers changes
    from version to version, nor device, nor dtype: an fp32 model and its bf16 cast agree, so do a bf16 model and its
    fp16 cast. Only fp32 weights cast to fp16 round twice and differ. Tied weights count once, buffers not at all.

    Args:
        model: all of its weights in memory, on any devices.

    Raises:
        UnsupportedModelError: parameters are offloaded or were never loaded.

    Example:
        >>> import lvlm_fastxai as fx
        >>> model, _ = fx.load_tiny_lvlm()
        >>> fingerprint(model) == fingerprint(model.bfloat16())
        True
    """
    digests = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"the weights of {name} are not in memory (offloaded, or never loaded), so the model has no "
                "fingerprint; load it without offloading"
            )
        digests.append(_digest(parameter.detach()))
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def _digest(values: Tensor) -> bytes:
    count = min(values.numel(), VALUES)
    places = torch.arange(count, device=values.device) * values.numel() // max(count, 1)
    # Indices along each axis, since a parameter that is not contiguous would be copied whole to be flattened.
    taken = values[torch.unravel_index(places, values.shape)] if values.ndim else values.reshape(1)
    rounded = taken.to("cpu", torch.bfloat16).float()
    rounded = torch.where(rounded.abs() < LEAST, 0.0, rounded).bfloat16().view(torch.int16)
    return hashlib.sha256(repr(tuple(values.shape)).encode() + rounded.numpy().astype("<i2").tobytes()).digest()


def model_name(model: Any) -> str:
    """What to call a model: the last part of the name or folder it was loaded from, never the folders before it."""
    name = Path(str(getattr(model, "name_or_path", "")))
    if name.is_dir() and name.resolve() == SHIPPED.resolve():
        return "the shipped LVLM"
    return name.name or type(model).__name__
