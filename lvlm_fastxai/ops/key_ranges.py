"""Every mask in scope lets a query row see one contiguous range of keys; this makes ranges of their descriptions."""

from __future__ import annotations

import torch
from torch import Tensor

from lvlm_fastxai.errors import ArgumentError


def _check_integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise ArgumentError(f"key_ranges: `{name}` must hold integers, got {tensor.dtype}")


def key_ranges(
    batch: int,
    query_length: int,
    key_length: int,
    *,
    causal: bool = True,
    window: int | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The keys that each query row may see, as half-open ranges.

    Args:
        batch, query_length, key_length: B, Sq, Sk.
        causal: key j is visible to the row at position i only when j ≤ i.
        window: sliding window that counts the row itself: i − window < j ≤ i when causal, |i − j| < window otherwise.
        query_positions: (B, Sq) integers, where each row stands among the keys; default the last Sq positions.
        lengths: (B,) number of real keys when padding is on the right, or (B, 2) half-open range of the real keys.
        device: where the result lives when no tensor is given.

    Returns:
        (B, Sq, 2) int32, start and end; start ≥ end marks a row that sees nothing.

    Raises:
        ArgumentError: a shape, dtype or value is wrong.

    Example:
        >>> key_ranges(1, 3, 3, window=2).tolist()
        [[[0, 1], [0, 2], [1, 3]]]
    """
    if window is not None and window < 1:
        raise ArgumentError(f"key_ranges: `window` must be at least 1, got {window}")
    if query_positions is not None:
        _check_integer("query_positions", query_positions)
        if query_positions.shape != (batch, query_length):
            raise ArgumentError(
                f"key_ranges: `query_positions` must have shape (B, Sq) = {(batch, query_length)}, "
                f"got {tuple(query_positions.shape)}"
            )
        device = query_positions.device
        position = query_positions.to(torch.int32)
    else:
        device = lengths.device if lengths is not None else device
        position = torch.arange(key_length - query_length, key_length, dtype=torch.int32, device=device)
        position = position.expand(batch, query_length)

    start = torch.zeros_like(position)
    end = torch.full_like(position, key_length)
    if lengths is not None:
        _check_integer("lengths", lengths)
        if lengths.shape not in ((batch,), (batch, 2)):
            raise ArgumentError(
                f"key_ranges: `lengths` must have shape (B,) or (B, 2) with B = {batch}, got {tuple(lengths.shape)}"
            )
        lengths = lengths.to(torch.int32)
        if lengths.dim() == 2:
            start = start.maximum(lengths[:, :1])
            end = end.minimum(lengths[:, 1:])
        else:
            end = end.minimum(lengths[:, None])
    if causal:
        end = end.minimum(position + 1)
    if window is not None:
        start = start.maximum(position - (window - 1))
        if not causal:
            end = end.minimum(position + window)
    return torch.stack((start, end), dim=-1)


def real_columns(key_ranges: Tensor) -> Tensor:
    """(B, 2) int32: the smallest range of keys that contains those of every row, out of (B, Sq, 2); (0, 0) without."""
    # One row more, which sees nothing: there may be none.
    start, end = torch.nn.functional.pad(key_ranges.to(torch.int32), (0, 0, 0, 1)).unbind(-1)
    seen = start < end
    first = start.masked_fill(~seen, torch.iinfo(torch.int32).max).amin(1)
    last = end.masked_fill(~seen, 0).amax(1)
    return torch.stack((first.minimum(last), last), dim=-1)
