"""Which library calls cover an attention whose rows each see one contiguous range of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

# Rows handled at once wherever a mask has to be looked at or applied; far below any S that matters for memory.
ROW_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Segment:
    """A rectangle of the attention that one library call can do: samples × query rows × keys."""

    samples: slice
    rows: slice
    keys: slice
    causal: bool = False
    masked: bool = False


@dataclass(slots=True)
class AttentionPlan:
    """Key ranges (B, Sq, 2) int32 and the library calls that cover them.

    ``keep_biases``: whether the small masks are kept for further calls. A plan for a few rows of one layer serves a
    forward and a backward only, and its masks together would be as large as those rows times the keys.
    """

    key_ranges: Tensor
    segments: tuple[Segment, ...]
    keep_biases: bool = True
    biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask (1, 1, rows, keys) of one segment, whose samples see the same keys; at most ``ROW_BLOCK`` rows
        high; None if it needs none."""
        segment = self.segments[index]
        if not segment.masked:
            return None
        if (index, dtype) in self.biases:
            return self.biases[index, dtype]
        ranges = self.key_ranges[segment.samples, segment.rows][:1]  # (1, rows, 2)
        columns = torch.arange(segment.keys.start, segment.keys.stop, device=ranges.device, dtype=torch.int32)
        visible = (columns >= ranges[..., :1]) & (columns < ranges[..., 1:])
        bias = torch.zeros(visible.shape, dtype=dtype, device=ranges.device).masked_fill_(~visible, -math.inf)[:, None]
        if self.keep_biases:
            self.biases[index, dtype] = bias
        return bias


def plan_attention(key_ranges: Tensor, *, keep_biases: bool = True) -> AttentionPlan:
    """Cover (B, Sq, 2) key ranges with as few library calls as their structure allows.

    Samples with equal ranges share a call. A run of rows that is plain causal becomes one causal call, rows that all
    see the same keys one unmasked call, and anything else blocks of at most ``ROW_BLOCK`` rows with a small bias.
    """
    host = key_ranges.detach().cpu()
    if bool((host == host[:1]).all()):
        groups = [(slice(0, host.shape[0]), host[0])]
    else:
        groups = [(slice(sample, sample + 1), ranges) for sample, ranges in enumerate(host)]
    segments: list[Segment] = []
    for samples, ranges in groups:
        segments += [
            Segment(samples, slice(top, bottom), slice(first, last), causal, masked)
            for top, bottom, first, last, causal, masked in _row_segments(ranges)
        ]
    return AttentionPlan(key_ranges, tuple(segments), keep_biases)


def plan_blind(key_ranges: Tensor, keys: int) -> AttentionPlan:
    """Cover (B, Sq, 2) key ranges without a look at them: blocks of at most ``ROW_BLOCK`` rows over all keys, masked.

    A look is a transfer to the host, for which an accelerator waits with nothing to do.
    """
    batch, rows = key_ranges.shape[:2]
    segments = [
        Segment(slice(sample, sample + 1), slice(top, min(top + ROW_BLOCK, rows)), slice(0, keys), masked=True)
        for sample in range(batch)
        for top in range(0, rows, ROW_BLOCK)
    ]
    return AttentionPlan(key_ranges, tuple(segments), keep_biases=False)


def _row_segments(ranges: Tensor) -> list[tuple[int, int, int, int, bool, bool]]:
    """(top, bottom, first key, last key, causal, masked) for one sample's (Sq, 2) ranges, empty rows left out."""
    starts, ends = ranges[:, 0].tolist(), ranges[:, 1].tolist()
    segments: list[tuple[int, int, int, int, bool, bool]] = []
    top, rows = 0, len(starts)
    while top < rows:
        if ends[top] <= starts[top]:
            top += 1
            continue
        bottom = top + 1
        if ends[top] == starts[top] + 1:  # may open a causal run: each row sees one key more than the last
            while bottom < rows and starts[bottom] == starts[top] and ends[bottom] == ends[bottom - 1] + 1:
                bottom += 1
            if bottom - top > 1 or bottom == rows:
                segments.append((top, bottom, starts[top], ends[bottom - 1], bottom - top > 1, False))
                top = bottom
                continue
        while bottom < rows and starts[bottom] == starts[top] and ends[bottom] == ends[top]:
            bottom += 1
        if bottom - top > 1:
            segments.append((top, bottom, starts[top], ends[top], False, False))
            top = bottom
            continue
        # A ragged block: stop before a run of rows that a single unmasked call covers better.
        while bottom < min(rows, top + ROW_BLOCK) and ends[bottom] > starts[bottom]:
            if bottom + 1 < rows and (starts[bottom], ends[bottom]) == (starts[bottom + 1], ends[bottom + 1]):
                break
            bottom += 1
        segments.append((top, bottom, min(starts[top:bottom]), max(ends[top:bottom]), False, bottom - top > 1))
        top = bottom
    return segments


def plain_ranges(batch: int, rows: int, keys: int, causal: bool, device: torch.device) -> Tensor:
    """Key ranges (B, Sq, 2) int32 without padding: causal (query rows are the last of the keys) or everything."""
    if keys > torch.iinfo(torch.int32).max:
        raise UnsupportedModelError(f"attention over {keys} keys: their positions do not fit in 32 bits")
    end = torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32, device=device)
    if not causal:
        end = torch.full_like(end, keys)
    return torch.stack([torch.zeros_like(end), end], dim=-1).expand(batch, rows, 2)
