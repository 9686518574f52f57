"""What the kernels share: which tiles there are to visit, how tiles are read, and how kernels are compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# Tiles of query rows that one step of the first launch looks at.
TILES_AT_ONCE = 16
# Rows of a tile in the interpreter: there are no registers to spill, and an operation costs the same whatever its size.
INTERPRETED_ROWS = 128
# A processor reads 16 bytes at a time: eight 16-bit numbers.
ALIGNMENT = 8
# Lengths differ from call to call, and a kernel compiled anew for one that is a multiple of 16 gains nothing from it.
SIZES = ["heads", "group", "queries", "keys", "targets", "key_blocks", "query_blocks", "chunks", "columns", "splits"]


@triton.jit(do_not_specialize=SIZES)
def list_tiles(
    key_start,  # (B, Sq)
    key_end,  # (B, Sq)
    row,  # (B, N, Sq) contiguous
    tiles,  # (B, chunks of targets, key blocks, query tiles): unmasked ones from the front, masked ones from the back
    counts,  # (B, chunks of targets, key blocks, 2): how many of each
    start_stride_b,
    start_stride_i,
    end_stride_b,
    end_stride_i,
    queries,
    keys,
    targets,
    key_blocks,
    chunks,
    TARGETS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    WEIGHTED: tl.constexpr,  # rows whose weight is zero need not be visited
):
    program = tl.program_id(0)
    first_key = program % key_blocks * BLOCK_K
    last_key = min(first_key + BLOCK_K, keys)
    first_target = program // key_blocks % chunks * TARGETS
    sample = (program // key_blocks // chunks).to(tl.int64)
    target_count = targets - first_target
    tile_count = tl.cdiv(queries, BLOCK_Q)
    row += (sample * targets + first_target) * queries
    key_start += sample * start_stride_b
    key_end += sample * end_stride_b
    tiles += program.to(tl.int64) * tile_count

    whole_count = 0
    part_count = 0
    for first_tile in range(0, tile_count, TILES):
        tile = first_tile + tl.arange(0, TILES)
        i = tile[:, None] * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
        inside = i < queries
        start = tl.load(key_start + i * start_stride_i, mask=inside, other=0)
        end = tl.load(key_end + i * end_stride_i, mask=inside, other=0)
        weighted = i < 0
        weighted_for_all = inside
        if WEIGHTED:
            for n in tl.static_range(TARGETS):
                # A program's last targets may not exist; it then looks at the last one again.
                weight = tl.load(row + min(n, target_count - 1) * queries + i, mask=inside, other=0.0)
                weighted |= weight != 0
                weighted_for_all &= weight != 0
        else:
            weighted = inside
        sees_some = weighted & (tl.maximum(start, first_key) < tl.minimum(end, last_key))
        sees_all = weighted_for_all & (start <= first_key) & (end >= last_key)
        whole = tl.min(sees_all.to(tl.int32), axis=1)
        part = tl.max(sees_some.to(tl.int32), axis=1) * (1 - whole)
        tl.store(tiles + whole_count + tl.cumsum(whole, axis=0) - 1, tile, mask=whole == 1)
        tl.store(tiles + tile_count - part_count - tl.cumsum(part, axis=0), tile, mask=part == 1)
        whole_count += tl.sum(whole, axis=0)
        part_count += tl.sum(part, axis=0)
    tl.store(counts + program * 2, whole_count)
    tl.store(counts + program * 2 + 1, part_count)


@triton.jit
def digits(number, a, b, c):
    """Four indices of a program, out of its number, from the one that runs fastest."""
    return number % a, number // a % b, number // a // b % c, number // a // b // c


@triton.jit
def load_rows(base, stride, count, FIRST: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, PIECE) of a matrix (count, WIDTH) from column FIRST on; zeros outside."""
    i = tl.arange(0, ROWS)[:, None]
    k = FIRST + tl.arange(0, PIECE)[None, :]
    return tl.load(base + i * stride + k, mask=(i < count) & (k < WIDTH), other=0.0)


@triton.jit
def load_columns(
    base,
    stride,
    count,
    FIRST: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(PIECE, ROWS): the transpose of `load_rows`, read in the same order."""
    i = tl.arange(0, ROWS)[None, :]
    k = FIRST + tl.arange(0, PIECE)[:, None]
    address = base + i * stride + k
    if MASKED:
        return tl.load(address, mask=(i < count) & (k < WIDTH), other=0.0)
    if FIRST + PIECE > WIDTH:
        return tl.load(address, mask=k < WIDTH, other=0.0)
    return tl.load(address)


@triton.jit
def load_piece(base, stride, rows, first, PIECE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, PIECE) of a matrix from column `first` on; zeros outside, and in rows that are not wanted."""
    k = first + tl.arange(0, PIECE)[None, :]
    return tl.load(base + tl.arange(0, ROWS)[:, None] * stride + k, mask=rows[:, None] & (k < WIDTH), other=0.0)


@triton.jit
def streamed_product(
    left,
    left_stride,
    left_rows,  # (LEFT,): which rows to read; zeros in the place of the others
    right,
    right_stride,
    right_rows,  # (RIGHT,)
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """(LEFT, RIGHT): left @ right.T, both read piece by piece: for widths and dtypes whose tiles do not fit."""
    left += tl.arange(0, LEFT)[:, None] * left_stride
    right += tl.arange(0, RIGHT)[None, :] * right_stride
    product = tl.zeros((LEFT, RIGHT), tl.float32)
    for first in range(0, WIDTH, PIECE):
        k = first + tl.arange(0, PIECE)
        a = tl.load(left + k[None, :], mask=left_rows[:, None] & (k[None, :] < WIDTH), other=0.0)
        b = tl.load(right + k[:, None], mask=right_rows[None, :] & (k[:, None] < WIDTH), other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
    return product


@triton.jit
def as_multiples(stride_b, stride_h, stride_i, ALIGNMENT: tl.constexpr):
    """The same strides, which the compiler now knows to be multiples. Else it reads rows of 72 elements one by one."""
    return stride_b // ALIGNMENT * ALIGNMENT, stride_h // ALIGNMENT * ALIGNMENT, stride_i // ALIGNMENT * ALIGNMENT


def listed_tiles(
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    row: Tensor,  # (B, N, Sq) contiguous
    keys: int,
    tile: tuple[int, int],
    *,
    targets_at_once: int,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `list_tiles` on the current device for tiles of (query rows, keys) and return its tiles and counts.

    Args:
        targets_at_once: for each chunk of so many targets there is a list of its own.
        weighted: whether rows whose weight is zero are left out.
    """
    (batch, targets, queries), (block_q, block_k) = row.shape, tile
    chunks = triton.cdiv(targets, targets_at_once) if weighted else 1
    key_blocks = triton.cdiv(keys, block_k)
    tiles = key_start.new_empty((batch, chunks, key_blocks, triton.cdiv(queries, block_q)), dtype=torch.int32)
    counts = key_start.new_empty((batch, chunks, key_blocks, 2), dtype=torch.int32)
    list_tiles[(batch * chunks * key_blocks,)](
        *(key_start, key_end, row, tiles, counts, *key_start.stride(), *key_end.stride()),
        *(queries, keys, targets, key_blocks, chunks),
        TARGETS=targets_at_once,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILES=TILES_AT_ONCE,
        WEIGHTED=weighted,
    )
    return tiles, counts


def pieces(width: int) -> tuple[int, int]:
    """Two powers of two, none below the 16 that a matrix product needs, that cover a width; the second may be 0."""
    low = max(16, 1 << (width.bit_length() - 1))
    if low >= width:
        return low, 0
    high = max(16, 1 << (width - low - 1).bit_length())
    return (2 * low, 0) if high >= low else (low, high)


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Every stride but that of the last axis, tensor after tensor."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:-1])


def alignment_of(*tensors: Tensor) -> int:
    """What the kernels are told that every stride is a multiple of."""
    return ALIGNMENT if all(stride % ALIGNMENT == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1


def launch_options() -> dict[str, Any]:
    """What the compiler is told beside them. Multiplications and additions are fused whatever Triton's default is."""
    # All registers that there are: left to itself ptxas would rather spill a few than use more than half of them.
    return {"num_warps": 8, "num_stages": 2, "maxnreg": 255, "enable_fp_fusion": True}


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before triton was imported."""
    return not isinstance(list_tiles, triton.JITFunction)


def with_contiguous_last_axis(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
