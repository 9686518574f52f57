"""The range of keys that each row sees. Every mask in scope lets a row see one contiguous range."""

from __future__ import annotations

import torch
from torch import Tensor

from lvlm_fastxai.ops._arguments import INT32, as_int32, refuse

NAME = "key_ranges"


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
    """Return the keys that each row may see, as half-open ranges.

    Args:
        batch, query_length, key_length: B, Sq, Sk.
        causal: key j is visible to the row at position i only when j ≤ i.
        window: sliding window that counts the row itself: i − window < j ≤ i when causal, |i − j| < window otherwise.
            At most 2³¹ − 1.
        query_positions: (B, Sq) integers, where each row stands among the keys; default the last Sq positions.
        lengths: (B,) number of real keys when padding is on the right, or (B, 2) half-open range of the real keys.
        device: where the result lives when no tensor is given.

    Returns:
        (B, Sq, 2) int32, start and end, both in 0 … Sk; start ≥ end marks a row that sees nothing.

    Raises:
        ArgumentError: a shape, dtype or value is wrong. Positions and lengths beyond int32 are refused on the CPU. On
            other devices, and in a compiled graph, they are moved to the nearest int32, which gives the same ranges.

    Example:
        >>> key_ranges(1, 3, 3, window=2).tolist()
        [[[0, 1], [0, 2], [1, 3]]]
    """
    if window is not None and window < 1:
        refuse(NAME, "window", "be at least 1", window)
    if window is not None and window > INT32.max:
        refuse(NAME, "window", f"be at most {INT32.max}", window)
    # Sums of two 32-bit numbers need more than 32 bits.
    if query_positions is not None:
        if query_positions.shape != (batch, query_length):
            expected = f"have shape (B, Sq) = {(batch, query_length)}"
            refuse(NAME, "query_positions", expected, tuple(query_positions.shape))
        device = query_positions.device
        position = as_int32(NAME, "query_positions", query_positions).to(torch.int64)
    else:
        device = lengths.device if lengths is not None else device
        position = torch.arange(key_length - query_length, key_length, device=device).expand(batch, query_length)

    start = torch.zeros_like(position)
    end = torch.full_like(position, key_length)
    if lengths is not None:
        if lengths.shape not in ((batch,), (batch, 2)):
            expected = f"have shape (B,) or (B, 2) with B = {batch}"
            refuse(NAME, "lengths", expected, tuple(lengths.shape))
        lengths = as_int32(NAME, "lengths", lengths)
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
    return torch.stack((start, end), dim=-1).clamp(0, key_length).to(torch.int32)


def real_columns(key_ranges: Tensor) -> Tensor:
    """Return the smallest range, (B, 2) int32, that contains the keys of every row, (B, Sq, 2); (0, 0) without keys."""
    # One row is added that sees nothing, since there may be no row.
    start, end = torch.nn.functional.pad(key_ranges.to(torch.int32), (0, 0, 0, 1)).unbind(-1)
    seen = start < end
    first = start.masked_fill(~seen, torch.iinfo(torch.int32).max).amin(1)
    last = end.masked_fill(~seen, 0).amax(1)
    return torch.stack((first.minimum(last), last), dim=-1)
