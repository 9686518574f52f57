"""Which model a head, a map or a policy belongs to, told by the weights alone."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModelError
from . import SHIPPED

VERSION = "v2-"
"""What a fingerprint begins with. Those of earlier versions were sixteen digits alone; they read 256 values of each
parameter."""

PIECE = 2**20  # values that a thread reads at once: 2 MiB of bf16 and what rounding them takes
THREADS = 4
PROBED = 256  # values of each parameter that tell whether a fingerprint that is known still holds
# The largest bf16 number below fp16's least normal one, 2⁻¹⁴: from there on downwards a bf16 value that is cast to fp16
# would come back changed.
SMALL = 2.0**-14 * (1 - 2.0**-8)

# model → (where its weights are and how often they were changed, digest of a few of their values, fingerprint)
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bytes, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Tell models apart by their weights: "v2-" and sixteen hexadecimal digits.

    The digits are the start of a SHA-256 over the sorted digests of the parameters. Each parameter's digest is of its
    shape and of all of its values, rounded to bf16, those below 2⁻¹⁴ taken as zero. So the parameters' names and order
    do not count, which transformers changes from version to version. Neither do device and dtype: an fp32 model and its
    bf16 cast agree, and so do a bf16 model and its fp16 cast. Only fp32 weights cast to fp16 round twice and differ.
    Tied weights count once, buffers not at all.

    The weights are read in pieces, by four threads, and take 40 MiB of memory however large the model is. One core of
    an AMD EPYC reads 1.0 GB/s of bf16 weights and 1.3 GB/s of fp32, where SHA-256 alone takes 1.6 GB/s: 14 s for 7 G
    parameters, divided by the cores that are free. The result is kept for as long as the model lives. It is computed
    anew when a parameter was replaced, was changed in place as torch counts it, or shows other values at 256 evenly
    spaced places: a few values that are written behind torch's back (through ``.data``) are noticed when the model is
    loaded again.

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
    parameters = [parameter.detach() for parameter in _loaded(model)]
    state = [_state(parameter) for parameter in parameters]
    probe = hashlib.sha256(b"".join(map(_probe, parameters))).digest()
    known = _known.get(model)
    if known is not None and known[:2] == (state, probe):
        return known[2]
    with ThreadPoolExecutor(THREADS) as threads:  # SHA-256 and torch let each other run
        digests = sorted(threads.map(_digest, parameters))
    found = VERSION + hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    _known[model] = (state, probe, found)
    return found


def is_outdated(recorded: str) -> bool:
    """Tell whether a fingerprint was recorded by an earlier version of this package, so that it fits no model now.

    Example:
        >>> is_outdated("d9a481790bdcac4c"), is_outdated("v2-d9a481790bdcac4c"), is_outdated("")
        (True, False, False)
    """
    return bool(recorded) and not recorded.startswith(VERSION)


def _loaded(model: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"the weights of {name} are not in memory (offloaded, or never loaded), so the model has no "
                "fingerprint; load it without offloading"
            )
        yield parameter


def _state(values: Tensor) -> tuple[Any, ...]:
    """Where a parameter's values are, and how often torch has changed them; inference tensors are not counted."""
    changes = None if values.is_inference() else values._version
    return values.data_ptr(), changes, values.shape, values.stride(), values.dtype, values.device


def _probe(values: Tensor) -> bytes:
    count = min(values.numel(), PROBED)
    places = torch.arange(count, device=values.device) * values.numel() // max(count, 1)
    # Indices along each axis, since a parameter that is not contiguous would be copied whole to be flattened.
    taken = values[torch.unravel_index(places, values.shape)] if values.ndim else values.reshape(1)
    return _rounded(taken)


def _digest(values: Tensor) -> bytes:
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    for piece in _pieces(values):
        digest.update(_rounded(piece))
    return digest.digest()


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """All values in the order of their indices, at most `PIECE` at once, however they lie in memory."""
    if values.is_contiguous():
        yield from values.view(-1).split(PIECE)
    elif values.numel() <= PIECE:
        yield values.reshape(-1)
    else:
        for part in values:
            yield from _pieces(part)


def _rounded(values: Tensor) -> bytes:
    if not values.is_floating_point():  # of a quantised model: as they are
        return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    rounded = functional.hardshrink(values.to(torch.bfloat16), SMALL)
    return rounded.cpu().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def model_name(model: Any) -> str:
    """Say what to call a model: the last part of the name or folder it was loaded from, never the folders before it."""
    name = Path(str(getattr(model, "name_or_path", "")))
    if name.is_dir() and name.resolve() == SHIPPED.resolve():
        return "the shipped LVLM"
    return name.name or type(model).__name__
