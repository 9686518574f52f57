"""glimpse_statistics in Triton: row sums, gradient sums and the layer's norm, without an S×S tensor or atomics.

One launch. A program owns a tile of query rows and every `splits`-th block of keys. All heads pass through each of its
blocks, so that Σ_h dP stays in registers until its magnitude is taken. What a head adds to the sums of its rows goes to
memory that is the program's own; torch adds the programs' sums up, in a fixed order.

Scores are computed where a row of the tile sees a key of the block: elsewhere, which in the "full" domain of a causal
problem is half of the blocks, one matrix product is left of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import (
    INTERPRETED_ROWS,
    LOG2_E,
    SIZES,
    alignment_of,
    as_multiples,
    digits,
    is_interpreted,
    launch_options,
    load_piece,
    strides_of,
    with_contiguous_last_axis,
)

__all__ = ["glimpse_statistics", "is_interpreted"]

# Enough programs to keep every processor busy: a tile's keys are split until there are as many.
PROGRAMS = 512
# Each takes 8·H·S bytes per sample and target.
MOST_SPLITS = 16


@triton.jit
def load_range(ranges, starts: tl.constexpr, rows, queries, keys, ROWS: tl.constexpr):
    """(ROWS,) twice: the first key of each row's range and the key after its last, equal where there is none."""
    address = ranges + starts * queries + tl.arange(0, ROWS)
    start = tl.maximum(tl.load(address, mask=rows, other=0), 0)
    end = tl.minimum(tl.load(address + queries, mask=rows, other=0), keys)
    return start, tl.maximum(start, end)


@triton.jit
def is_inside(j, ranges, starts: tl.constexpr, rows, queries, keys, ROWS: tl.constexpr):
    """(ROWS, keys): whether a key is in its row's range."""
    start, end = load_range(ranges, starts, rows, queries, keys, ROWS)
    # A single comparison of unsigned numbers.
    return (j[None, :] - start[:, None]).to(tl.uint32) < (end - start).to(tl.uint32)[:, None]


@triton.jit
def union(start, end, rows, keys):
    """The first key and the end of what the ranges of some rows hold together."""
    return tl.min(tl.where(rows, start, keys), axis=0), tl.max(tl.where(rows, end, 0), axis=0)


@triton.jit
def intersection(start, end, rows, keys):
    """The first key and the end of what the range of each of some rows holds."""
    return tl.max(tl.where(rows, start, 0), axis=0), tl.min(tl.where(rows, end, keys), axis=0)


@triton.jit
def offset_of(head, stride, ALIGNMENT: tl.constexpr):
    """head · stride in 64 bits. A product of 32 bits takes fewer registers; in units of 8 elements it has room."""
    if ALIGNMENT > 1:
        offset = tl.cast(head * (stride // ALIGNMENT), tl.int64) * ALIGNMENT
    else:
        offset = tl.cast(head, tl.int64) * stride
    return offset


@triton.jit
def add_row_sums(sums, tile, rows, ROWS: tl.constexpr):
    """Adds a tile's sums over its keys to those of the program."""
    address = sums + tl.arange(0, ROWS)
    tl.store(address, tl.load(address, mask=rows, other=0.0) + tl.sum(tile, axis=1), mask=rows)


@triton.jit
def add_heads(
    count,  # of rows, from the tile's first on
    first_key,
    query,  # of this tile and the first head, like grad_output and the sums
    query_stride_h,
    query_stride_i,
    grad_output,
    grad_stride_h,
    grad_stride_i,
    logsumexp,
    row_sums,
    gradient_sums,
    norms,
    key,  # of this block and the first key head
    key_stride_h,
    key_stride_j,
    value,
    value_stride_h,
    value_stride_j,
    ranges,  # of this tile
    summing,  # (BLOCK_Q,): which rows have sums
    key_rows,  # (BLOCK_K,): which keys to read
    heads,
    queries,
    keys,
    score_scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SCORED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what every head has in one tile to the program's sums, then what the heads have together."""
    i = tl.arange(0, BLOCK_Q)
    j = first_key + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    change = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    product = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    # One loop over the pieces of every head's dP and, after them, of its scores: the next piece is read, whosever it
    # is, while one is multiplied.
    steps: tl.constexpr = 2 * PIECES if SCORED else PIECES
    for position in range(heads * steps):
        head = position // steps
        key_head = head // GROUP
        step = position % steps
        of_head = tl.cast(head, tl.int64) * queries
        rows = grad_output + offset_of(head, grad_stride_h, ALIGNMENT)
        columns = value + offset_of(key_head, value_stride_h, ALIGNMENT)
        row_stride = grad_stride_i
        column_stride = value_stride_j
        if SCORED:
            of_gradient = step < PIECES
            rows = tl.where(of_gradient, rows, query + offset_of(head, query_stride_h, ALIGNMENT))
            columns = tl.where(of_gradient, columns, key + offset_of(key_head, key_stride_h, ALIGNMENT))
            row_stride = tl.where(of_gradient, row_stride, query_stride_i)
            column_stride = tl.where(of_gradient, column_stride, key_stride_j)
        first = step % PIECES * PIECE
        # A row without sums may hold NaN: it spoils no other.
        left = load_piece(rows, row_stride, i < count, first, PIECE, WIDTH, BLOCK_Q)
        right = load_piece(columns, column_stride, key_rows, first, PIECE, WIDTH, BLOCK_K)
        product = tl.dot(left, tl.trans(right), product, input_precision="ieee")
        if step == PIECES - 1:
            change = product
            if MASKED:
                # Ranges are read anew for each head: there are no registers to keep them in.
                summed = is_inside(j, ranges, 2, summing, queries, keys, BLOCK_Q)
                change = tl.where(summed, change, 0.0)
            total += change
            # Keeps NaN, as torch.clamp does.
            positive = tl.maximum(change, 0.0, propagate_nan=tl.PropagateNan.ALL)
            add_row_sums(gradient_sums + of_head, positive, summing, BLOCK_Q)
            product = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        if SCORED:
            scored = step == steps - 1
            if scored:
                normaliser = tl.load(logsumexp + of_head + i, mask=summing, other=0.0) * 1.4426950408889634
                probability = tl.exp2(product * score_scale - normaliser[:, None])
                positive = tl.maximum(probability * change, 0.0, propagate_nan=tl.PropagateNan.ALL)
                if MASKED:
                    visible = is_inside(j, ranges, 0, summing, queries, keys, BLOCK_Q)
                    positive = tl.where(visible, positive, 0.0)
                add_row_sums(row_sums + of_head, positive, summing, BLOCK_Q)
                product = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    add_row_sums(norms, tl.abs(total), summing, BLOCK_Q)


@triton.jit(do_not_specialize=SIZES)
def tile_sums(
    query,  # (B, H, Sq, d)
    key,  # (B, Hkv, Sk, d)
    value,  # (B, Hkv, Sk, d)
    grad_output,  # (B, N, H, Sq, d)
    logsumexp,  # (B, H, Sq) contiguous
    ranges,  # (B, 4, Sq) contiguous: key_start, key_end, sum_start, sum_end
    row_sums,  # (B, N, splits, H, Sq) contiguous, zeros
    gradient_sums,  # (B, N, splits, H, Sq) contiguous, zeros
    norms,  # (B, N, splits, Sq) contiguous, zeros
    query_stride_b,
    query_stride_h,
    query_stride_i,
    key_stride_b,
    key_stride_h,
    key_stride_j,
    value_stride_b,
    value_stride_h,
    value_stride_j,
    grad_stride_b,
    grad_stride_n,
    grad_stride_h,
    grad_stride_i,
    heads,
    queries,
    keys,
    targets,
    query_blocks,
    splits,
    score_scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides every stride of the four
):
    # The last rows, which see most under a causal mask, come first, so that only light programs trail.
    program = tl.program_id(0)
    split, block, target, sample = digits(program, splits, query_blocks, targets)
    block, target, sample = query_blocks - 1 - block, target.to(tl.int64), sample.to(tl.int64)
    first_query = block.to(tl.int64) * BLOCK_Q
    query_steps = as_multiples(query_stride_b, query_stride_h, query_stride_i, ALIGNMENT)
    key_steps = as_multiples(key_stride_b, key_stride_h, key_stride_j, ALIGNMENT)
    value_steps = as_multiples(value_stride_b, value_stride_h, value_stride_j, ALIGNMENT)
    grad_steps = as_multiples(grad_stride_b, grad_stride_h, grad_stride_i, ALIGNMENT)
    grad_stride_n = grad_stride_n // ALIGNMENT * ALIGNMENT

    query += sample * query_steps[0] + first_query * query_steps[2]
    key += sample * key_steps[0]
    value += sample * value_steps[0]
    grad_output += sample * grad_steps[0] + target * grad_stride_n + first_query * grad_steps[2]
    logsumexp += sample * heads * queries + first_query
    part = (sample * targets + target) * splits + split
    row_sums += part * heads * queries + first_query
    gradient_sums += part * heads * queries + first_query
    norms += part * queries + first_query
    ranges += sample * 4 * queries + first_query

    count = queries - block * BLOCK_Q
    inside = tl.arange(0, BLOCK_Q) < count
    start, end = load_range(ranges, 0, inside, queries, keys, BLOCK_Q)
    first, last = load_range(ranges, 2, inside, queries, keys, BLOCK_Q)
    seeing, summing = start < end, first < last
    # Keys that some row sees, keys that all rows see, and the same of the sums. A row without sums has no say.
    first_seen, last_seen = union(start, end, seeing, keys)
    first_seen_by_all, last_seen_by_all = intersection(start, end, summing, keys)
    first_summed, last_summed = union(first, last, summing, keys)
    first_summed_by_all, last_summed_by_all = intersection(first, last, summing, keys)

    for first_key in range((first_summed // BLOCK_K + split) * BLOCK_K, last_summed, splits * BLOCK_K):
        j = first_key + tl.arange(0, BLOCK_K)
        last_key = first_key + BLOCK_K
        key_rows = (j >= first_summed) & (j < last_summed)
        keys_here = key + tl.cast(first_key, tl.int64) * key_steps[2]
        values_here = value + tl.cast(first_key, tl.int64) * value_steps[2]
        unseen = (last_key <= first_seen) | (first_key >= last_seen)
        # Keys that no row sums over are read as zeros, and need no mask.
        summed = (first_summed_by_all <= tl.maximum(first_key, first_summed)) & (
            last_summed_by_all >= tl.minimum(last_key, last_summed)
        )
        if unseen & summed:
            add_heads(
                count, first_key, query, query_steps[1], query_steps[2], grad_output, grad_steps[1], grad_steps[2],
                logsumexp, row_sums, gradient_sums, norms, keys_here, key_steps[1], key_steps[2], values_here,
                value_steps[1], value_steps[2], ranges, summing, key_rows, heads, queries, keys, score_scale,
                GROUP, WIDTH, PIECE, PIECES, BLOCK_Q, BLOCK_K, ALIGNMENT, False, False,
            )  # fmt: skip
        elif (first_seen_by_all <= first_key) & (last_seen_by_all >= last_key):
            add_heads(
                count, first_key, query, query_steps[1], query_steps[2], grad_output, grad_steps[1], grad_steps[2],
                logsumexp, row_sums, gradient_sums, norms, keys_here, key_steps[1], key_steps[2], values_here,
                value_steps[1], value_steps[2], ranges, summing, key_rows, heads, queries, keys, score_scale,
                GROUP, WIDTH, PIECE, PIECES, BLOCK_Q, BLOCK_K, ALIGNMENT, True, False,
            )  # fmt: skip
        else:
            add_heads(
                count, first_key, query, query_steps[1], query_steps[2], grad_output, grad_steps[1], grad_steps[2],
                logsumexp, row_sums, gradient_sums, norms, keys_here, key_steps[1], key_steps[2], values_here,
                value_steps[1], value_steps[2], ranges, summing, key_rows, heads, queries, keys, score_scale,
                GROUP, WIDTH, PIECE, PIECES, BLOCK_Q, BLOCK_K, ALIGNMENT, True, True,
            )  # fmt: skip
        # The next block's threads may read other sums than they have written.
        tl.debug_barrier()


class Configuration(NamedTuple):
    """How `tile_sums` is compiled for one problem."""

    block_q: int
    block_k: int
    piece: int  # columns of the operands that are read at a time


def configuration(dtype: torch.dtype, width: int) -> Configuration:
    """Tiles that neither spill registers nor exceed shared memory; `make triton` checks that for every architecture."""
    if is_interpreted():
        return Configuration(INTERPRETED_ROWS, INTERPRETED_ROWS, 64)
    if dtype == torch.float32:
        return Configuration(64, 32, 16)
    return Configuration(128, 64, 64 if width % 64 == 0 else 32)


def splits_of(tiles: int, key_blocks: int) -> int:
    """Among how many programs a tile shares its blocks of keys."""
    # The interpreter runs programs one after the other; two of them, so that sums of several blocks and of several
    # programs are tested.
    most = 2 if is_interpreted() else min(MOST_SPLITS, triton.cdiv(PROGRAMS, tiles))
    return min(most, key_blocks)


def constants(configuration: Configuration, group: int, width: int, alignment: int) -> dict[str, Any]:
    """The compile-time arguments of `tile_sums`."""
    return {
        "GROUP": group,
        "WIDTH": width,
        "PIECE": configuration.piece,
        "PIECES": triton.cdiv(width, configuration.piece),
        "BLOCK_Q": configuration.block_q,
        "BLOCK_K": configuration.block_k,
        "ALIGNMENT": alignment,
    }


def glimpse_statistics(
    query: Tensor,  # (B, H, Sq, d)
    key: Tensor,  # (B, Hkv, Sk, d)
    value: Tensor,  # (B, Hkv, Sk, d)
    grad_output: Tensor,  # (B, N, H, Sq, d)
    logsumexp: Tensor,  # (B, H, Sq)
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    sum_start: Tensor,  # (B, Sq)
    sum_end: Tensor,  # (B, Sq)
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on tensors that its checks have passed; see `lvlm_fastxai.ops.glimpse_statistics`."""
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    targets = grad_output.shape[1]
    if 0 in (batch, targets, queries, keys):
        return (
            logsumexp.new_zeros((batch, targets, heads, queries)),
            logsumexp.new_zeros((batch, targets, heads)),
            logsumexp.new_zeros((batch, targets)),
        )
    chosen = configuration(query.dtype, width)
    query, key, value, grad_output = map(with_contiguous_last_axis, (query, key, value, grad_output))
    logsumexp = logsumexp.contiguous()

    ranges = torch.stack((key_start, key_end, sum_start, sum_end), dim=1)
    query_blocks = triton.cdiv(queries, chosen.block_q)
    tiles = batch * targets * query_blocks
    splits = splits_of(tiles, triton.cdiv(keys, chosen.block_k))
    # Zeros, since not every split has a block of keys to visit.
    row_sums = logsumexp.new_zeros((batch, targets, splits, heads, queries))
    gradient_sums = torch.zeros_like(row_sums)
    norms = logsumexp.new_zeros((batch, targets, splits, queries))
    # Triton launches on the current device.
    with torch.cuda.device_of(query):
        tile_sums[(tiles * splits,)](
            *(query, key, value, grad_output, logsumexp, ranges, row_sums, gradient_sums, norms),
            *strides_of(query, key, value, grad_output),
            *(heads, queries, keys, targets, query_blocks, splits, scale * LOG2_E),
            **constants(chosen, heads // key_heads, width, alignment_of(query, key, value, grad_output)),
            **launch_options(),
        )
        return row_sums.sum(dim=2), gradient_sums.sum(dim=(2, 4)), norms.sum(dim=(2, 3))
