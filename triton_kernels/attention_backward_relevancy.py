"""attention_backward_relevancy in Triton: dQ, dK, dV and the relevancy product, without an S×S tensor or atomics.

Four launches. The first lists, for every block of keys, the tiles of query rows that see any of it. The second gives
every row its D = dO·O. In the third each program owns one block of keys of one key head: it walks its list for every
query head of that key head, and keeps dK, dV and the product's column sums in registers. In the fourth each program
owns one block of query rows, walks the keys from the first to the last that one of them sees, and keeps dQ.

Scores are recomputed in both, once for each target: seven matrix products a tile in place of the five that a single
kernel would need if it added dQ up with atomics, whose order, and so whose result, changes from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import (
    ALIGNMENT,
    INTERPRETED_ROWS,
    LOG2_E,
    SIZES,
    TILES_AT_ONCE,
    alignment_of,
    as_multiples,
    is_interpreted,
    launch_options,
    list_tiles,
    load_piece,
    streamed_product,
    with_contiguous_last_axis,
)

__all__ = ["attention_backward_relevancy", "is_interpreted"]


@triton.jit
def store_piece(base, sums, rows, first, PIECE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Writes columns from `first` on to the rows of a contiguous matrix."""
    k = first + tl.arange(0, PIECE)[None, :]
    address = base + tl.arange(0, ROWS)[:, None] * WIDTH + k
    tl.store(address, sums.to(base.dtype.element_ty), mask=rows[:, None] & (k < WIDTH))


@triton.jit(do_not_specialize=SIZES)
def row_deltas(
    output,  # (B, H, Sq, d)
    grad_output,  # (B, N, H, Sq, d)
    delta,  # (B, N, H, Sq) contiguous
    output_stride_b,
    output_stride_h,
    output_stride_i,
    grad_stride_b,
    grad_stride_n,
    grad_stride_h,
    grad_stride_i,
    heads,
    queries,
    targets,
    query_blocks,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    program = tl.program_id(0)
    first_query = (program % query_blocks).to(tl.int64) * BLOCK_Q
    head = (program // query_blocks % heads).to(tl.int64)
    target = (program // query_blocks // heads % targets).to(tl.int64)
    sample = (program // query_blocks // heads // targets).to(tl.int64)
    output_stride_b, output_stride_h, output_stride_i = as_multiples(
        output_stride_b, output_stride_h, output_stride_i, ALIGNMENT
    )
    grad_stride_b, grad_stride_h, grad_stride_i = as_multiples(grad_stride_b, grad_stride_h, grad_stride_i, ALIGNMENT)
    grad_stride_n = grad_stride_n // ALIGNMENT * ALIGNMENT
    output += sample * output_stride_b + head * output_stride_h + first_query * output_stride_i
    grad_output += sample * grad_stride_b + target * grad_stride_n + head * grad_stride_h + first_query * grad_stride_i
    delta += ((sample * targets + target) * heads + head) * queries + first_query
    i = tl.arange(0, BLOCK_Q)
    inside = i < queries - first_query
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for first in range(0, WIDTH, PIECE):
        left = load_piece(output, output_stride_i, inside, first, PIECE, WIDTH, BLOCK_Q).to(tl.float32)
        right = load_piece(grad_output, grad_stride_i, inside, first, PIECE, WIDTH, BLOCK_Q).to(tl.float32)
        total += tl.sum(left * right, axis=1)
    tl.store(delta + i, total, mask=inside)


@triton.jit
def add_tile_of_rows(
    grad_key,
    grad_value,
    product,  # (BLOCK_K,)
    tile,
    first_key,
    first_column,
    key,  # of this block: the address when streamed, else the tile
    key_stride,
    value,
    value_stride,
    query,  # of this head
    query_stride,
    grad_output,  # of this head and target
    grad_stride,
    logsumexp,
    delta,
    row,
    key_start,
    key_end,
    start_stride,
    end_stride,
    queries,
    keys,
    score_scale,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    first_query = tile.to(tl.int64) * BLOCK_Q
    i = first_query + tl.arange(0, BLOCK_Q)
    inside = i < queries
    query += first_query * query_stride
    grad_output += first_query * grad_stride
    if MASKED:
        start = tl.maximum(tl.load(key_start + i * start_stride, mask=inside, other=0), 0)
        end = tl.minimum(tl.load(key_end + i * end_stride, mask=inside, other=0), keys)
        # Rows that see nothing of this block are not read: 0 · NaN would be NaN.
        inside &= tl.maximum(start, first_key) < tl.minimum(end, first_key + BLOCK_K)
        # A single comparison of unsigned numbers then says whether start <= j < end.
        length = tl.maximum(end - start, 0).to(tl.uint32)
        distance = (first_key + tl.arange(0, BLOCK_K)[:, None] - start[None, :]).to(tl.uint32)
    total = tl.load(logsumexp + i, mask=inside, other=0.0)
    correction = tl.load(delta + i, mask=inside, other=0.0)
    weight = tl.load(row + i, mask=inside, other=0.0)

    query_tile = load_piece(query, query_stride, inside, first_column, COLUMNS, WIDTH, BLOCK_Q)
    grad_tile = load_piece(grad_output, grad_stride, inside, first_column, COLUMNS, WIDTH, BLOCK_Q)
    if RESIDENT:
        score = tl.dot(key, tl.trans(query_tile))
        change = tl.dot(value, tl.trans(grad_tile))
    else:
        key_rows = tl.arange(0, BLOCK_K) < keys - first_key
        score = streamed_product(key, key_stride, key_rows, query, query_stride, inside, PIECE, WIDTH, BLOCK_K, BLOCK_Q)
        change = streamed_product(
            value, value_stride, key_rows, grad_output, grad_stride, inside, PIECE, WIDTH, BLOCK_K, BLOCK_Q
        )
    probability = tl.exp2(score * score_scale - (total * 1.4426950408889634)[None, :])
    grad_score = probability * (change - correction[None, :])
    # Keeps NaN, as torch.clamp does.
    positive = tl.maximum(probability * change, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if MASKED:
        visible = distance < length[None, :]
        probability = tl.where(visible, probability, 0.0)
        grad_score = tl.where(visible, grad_score, 0.0)
        # What is hidden or weighs nothing counts for nothing, even where it is not finite.
        share = tl.where(visible & (weight != 0)[None, :], positive * weight[None, :], 0.0)
    else:
        share = tl.where((weight != 0)[None, :], positive * weight[None, :], 0.0)
    grad_key = tl.dot(grad_score.to(query_tile.dtype), query_tile, grad_key, input_precision="ieee")
    grad_value = tl.dot(probability.to(grad_tile.dtype), grad_tile, grad_value, input_precision="ieee")
    return grad_key, grad_value, product + tl.sum(share, axis=1)


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    query,  # (B, H, Sq, d)
    key,  # (B, Hkv, Sk, d)
    value,  # (B, Hkv, Sk, d)
    grad_output,  # (B, N, H, Sq, d)
    logsumexp,  # (B, H, Sq) contiguous
    delta,  # (B, N, H, Sq) contiguous
    row,  # (B, N, Sq) contiguous
    key_start,  # (B, Sq)
    key_end,  # (B, Sq)
    tiles,
    counts,
    grad_key,  # (B, N, Hkv, Sk, d) contiguous
    grad_value,  # (B, N, Hkv, Sk, d) contiguous
    partial,  # (B, N, Hkv, Sk) contiguous
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
    start_stride_b,
    start_stride_i,
    end_stride_b,
    end_stride_i,
    heads,
    group,
    queries,
    keys,
    targets,
    key_blocks,
    columns,
    score_scale,
    scale,
    head_share,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides every stride of the four
):
    # Blocks of keys run fastest, as in relevancy_product.
    program = tl.program_id(0)
    key_heads = heads // group
    block = program % key_blocks
    column = program // key_blocks % columns
    key_head = (program // key_blocks // columns % key_heads).to(tl.int64)
    target = (program // key_blocks // columns // key_heads % targets).to(tl.int64)
    sample = (program // key_blocks // columns // key_heads // targets).to(tl.int64)
    first_key = block * BLOCK_K
    query_stride_b, query_stride_h, query_stride_i = as_multiples(
        query_stride_b, query_stride_h, query_stride_i, ALIGNMENT
    )
    key_stride_b, key_stride_h, key_stride_j = as_multiples(key_stride_b, key_stride_h, key_stride_j, ALIGNMENT)
    value_stride_b, value_stride_h, value_stride_j = as_multiples(
        value_stride_b, value_stride_h, value_stride_j, ALIGNMENT
    )
    grad_stride_b, grad_stride_h, grad_stride_i = as_multiples(grad_stride_b, grad_stride_h, grad_stride_i, ALIGNMENT)
    grad_stride_n = grad_stride_n // ALIGNMENT * ALIGNMENT

    query += sample * query_stride_b + key_head * group * query_stride_h
    key += sample * key_stride_b + key_head * key_stride_h + first_key.to(tl.int64) * key_stride_j
    value += sample * value_stride_b + key_head * value_stride_h + first_key.to(tl.int64) * value_stride_j
    grad_output += sample * grad_stride_b + target * grad_stride_n + key_head * group * grad_stride_h
    logsumexp += (sample * heads + key_head * group) * queries
    delta += ((sample * targets + target) * heads + key_head * group) * queries
    row += (sample * targets + target) * queries
    key_start += sample * start_stride_b
    key_end += sample * end_stride_b
    tile_count = tl.cdiv(queries, BLOCK_Q)
    listed = sample * key_blocks + block
    tiles += listed * tile_count
    whole_count = tl.load(counts + listed * 2)
    part_count = tl.load(counts + listed * 2 + 1)

    if RESIDENT:
        first_column = 0
        inside = tl.arange(0, BLOCK_K) < keys - first_key
        key_rows = load_piece(key, key_stride_j, inside, 0, COLUMNS, WIDTH, BLOCK_K)
        value_rows = load_piece(value, value_stride_j, inside, 0, COLUMNS, WIDTH, BLOCK_K)
    else:
        first_column = column * COLUMNS
        key_rows = key
        value_rows = value

    key_sums = tl.zeros((BLOCK_K, COLUMNS), tl.float32)
    value_sums = tl.zeros((BLOCK_K, COLUMNS), tl.float32)
    product = tl.zeros((BLOCK_K,), tl.float32)
    for _ in range(group):
        for position in range(whole_count):
            key_sums, value_sums, product = add_tile_of_rows(
                key_sums, value_sums, product, tl.load(tiles + position), first_key, first_column, key_rows,
                key_stride_j, value_rows, value_stride_j, query, query_stride_i, grad_output, grad_stride_i, logsumexp,
                delta, row, key_start, key_end, start_stride_i, end_stride_i, queries, keys, score_scale,
                WIDTH, COLUMNS, PIECE, RESIDENT, BLOCK_Q, BLOCK_K, False,
            )  # fmt: skip
        for position in range(tile_count - part_count, tile_count):
            key_sums, value_sums, product = add_tile_of_rows(
                key_sums, value_sums, product, tl.load(tiles + position), first_key, first_column, key_rows,
                key_stride_j, value_rows, value_stride_j, query, query_stride_i, grad_output, grad_stride_i, logsumexp,
                delta, row, key_start, key_end, start_stride_i, end_stride_i, queries, keys, score_scale,
                WIDTH, COLUMNS, PIECE, RESIDENT, BLOCK_Q, BLOCK_K, True,
            )  # fmt: skip
        query += query_stride_h
        grad_output += grad_stride_h
        logsumexp += queries
        delta += queries

    first = ((sample * targets + target) * key_heads + key_head) * keys + first_key
    j = tl.arange(0, BLOCK_K)
    inside = j < keys - first_key
    store_piece(grad_key + first * WIDTH, key_sums * scale, inside, first_column, COLUMNS, WIDTH, BLOCK_K)
    store_piece(grad_value + first * WIDTH, value_sums, inside, first_column, COLUMNS, WIDTH, BLOCK_K)
    if column == 0:
        tl.store(partial + first + j, product * head_share, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    query,  # (B, H, Sq, d)
    key,  # (B, Hkv, Sk, d)
    value,  # (B, Hkv, Sk, d)
    grad_output,  # (B, N, H, Sq, d)
    logsumexp,  # (B, H, Sq) contiguous
    delta,  # (B, N, H, Sq) contiguous
    key_start,  # (B, Sq)
    key_end,  # (B, Sq)
    grad_query,  # (B, N, H, Sq, d) contiguous
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
    start_stride_b,
    start_stride_i,
    end_stride_b,
    end_stride_i,
    heads,
    group,
    queries,
    keys,
    targets,
    query_blocks,
    columns,
    score_scale,
    scale,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides every stride of the four
):
    # The last rows, which see most under a causal mask, come first, so that only light programs trail.
    program = tl.program_id(0)
    block = query_blocks - 1 - program % query_blocks
    column = program // query_blocks % columns
    head = (program // query_blocks // columns % heads).to(tl.int64)
    target = (program // query_blocks // columns // heads % targets).to(tl.int64)
    sample = (program // query_blocks // columns // heads // targets).to(tl.int64)
    first_query = block.to(tl.int64) * BLOCK_Q
    query_stride_b, query_stride_h, query_stride_i = as_multiples(
        query_stride_b, query_stride_h, query_stride_i, ALIGNMENT
    )
    key_stride_b, key_stride_h, key_stride_j = as_multiples(key_stride_b, key_stride_h, key_stride_j, ALIGNMENT)
    value_stride_b, value_stride_h, value_stride_j = as_multiples(
        value_stride_b, value_stride_h, value_stride_j, ALIGNMENT
    )
    grad_stride_b, grad_stride_h, grad_stride_i = as_multiples(grad_stride_b, grad_stride_h, grad_stride_i, ALIGNMENT)
    grad_stride_n = grad_stride_n // ALIGNMENT * ALIGNMENT

    query += sample * query_stride_b + head * query_stride_h + first_query * query_stride_i
    key += sample * key_stride_b + head // group * key_stride_h
    value += sample * value_stride_b + head // group * value_stride_h
    grad_output += sample * grad_stride_b + target * grad_stride_n + head * grad_stride_h + first_query * grad_stride_i
    of_head = (sample * targets + target) * heads + head
    i = first_query + tl.arange(0, BLOCK_Q)
    inside = i < queries
    start = tl.load(key_start + sample * start_stride_b + i * start_stride_i, mask=inside, other=0)
    end = tl.load(key_end + sample * end_stride_b + i * end_stride_i, mask=inside, other=0)
    start = tl.maximum(start, 0)
    end = tl.minimum(end, keys)
    # Rows and keys that are not seen here are not read: 0 · NaN would be NaN.
    seeing = start < end
    first_seen = tl.min(tl.where(seeing, start, keys), axis=0)
    last_seen = tl.max(tl.where(seeing, end, 0), axis=0)
    length = tl.maximum(end - start, 0).to(tl.uint32)
    total = tl.load(logsumexp + (sample * heads + head) * queries + i, mask=seeing, other=0.0) * 1.4426950408889634
    correction = tl.load(delta + of_head * queries + i, mask=seeing, other=0.0)

    if RESIDENT:
        first_column = 0
        query_rows = load_piece(query, query_stride_i, seeing, 0, COLUMNS, WIDTH, BLOCK_Q)
        grad_rows = load_piece(grad_output, grad_stride_i, seeing, 0, COLUMNS, WIDTH, BLOCK_Q)
    else:
        first_column = column * COLUMNS
    sums = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    for first_key in range(first_seen // BLOCK_K * BLOCK_K, last_seen, BLOCK_K):
        j = first_key + tl.arange(0, BLOCK_K)
        seen = (j >= first_seen) & (j < last_seen)
        keys_here = key + tl.cast(first_key, tl.int64) * key_stride_j
        values_here = value + tl.cast(first_key, tl.int64) * value_stride_j
        key_tile = load_piece(keys_here, key_stride_j, seen, first_column, COLUMNS, WIDTH, BLOCK_K)
        if RESIDENT:
            value_tile = load_piece(values_here, value_stride_j, seen, 0, COLUMNS, WIDTH, BLOCK_K)
            score = tl.dot(query_rows, tl.trans(key_tile))
            change = tl.dot(grad_rows, tl.trans(value_tile))
        else:
            score = streamed_product(
                query, query_stride_i, seeing, keys_here, key_stride_j, seen, PIECE, WIDTH, BLOCK_Q, BLOCK_K
            )
            change = streamed_product(
                grad_output, grad_stride_i, seeing, values_here, value_stride_j, seen, PIECE, WIDTH, BLOCK_Q, BLOCK_K
            )
        probability = tl.exp2(score * score_scale - total[:, None])
        visible = (j[None, :] - start[:, None]).to(tl.uint32) < length[:, None]
        grad_score = tl.where(visible, probability * (change - correction[:, None]), 0.0)
        sums = tl.dot(grad_score.to(key_tile.dtype), key_tile, sums, input_precision="ieee")

    grad_query += (of_head * queries + first_query) * WIDTH
    store_piece(grad_query, sums * scale, inside, first_column, COLUMNS, WIDTH, BLOCK_Q)


class Configuration(NamedTuple):
    """How `key_gradients` and `query_gradients` are compiled for one problem."""

    key_tile: tuple[int, int]  # of `key_gradients`: query rows that it reads at a time, keys that a program owns
    query_tile: tuple[int, int]  # of `query_gradients`: query rows that a program owns, keys that it reads at a time
    columns: int  # of the gradients that a program owns, a power of two: all, or one piece of them
    piece: int  # columns that a product reads at a time where the operands do not stay on the chip
    resident: bool  # what the program owns of the operands stays on the chip; it then owns all columns


def configuration(dtype: torch.dtype, width: int) -> Configuration:
    """Tiles that neither spill registers nor exceed shared memory; `make triton` checks that for every architecture."""
    resident = dtype != torch.float32 and width <= 128
    columns = min(128 if resident else 64, max(16, triton.next_power_of_2(width)))
    if is_interpreted():
        return Configuration((INTERPRETED_ROWS, 64), (INTERPRETED_ROWS, 64), columns, 64, resident)
    # Rows that are not read 16 bytes at a time pass through registers on their way to shared memory.
    aligned = width % ALIGNMENT == 0
    key_tile = (32, 32) if resident and not aligned else (16, 64)
    return Configuration(key_tile, (64, 32 if aligned else 16), columns, 32 if aligned else 16, resident)


def constants(configuration: Configuration, width: int, alignment: int, tile: tuple[int, int]) -> dict[str, Any]:
    """The compile-time arguments of one of the two, whose tile is given."""
    return {
        "WIDTH": width,
        "COLUMNS": configuration.columns,
        "PIECE": configuration.piece,
        "RESIDENT": configuration.resident,
        "BLOCK_Q": tile[0],
        "BLOCK_K": tile[1],
        "ALIGNMENT": alignment,
    }


def attention_backward_relevancy(
    query: Tensor,  # (B, H, Sq, d)
    key: Tensor,  # (B, Hkv, Sk, d)
    value: Tensor,  # (B, Hkv, Sk, d)
    output: Tensor,  # (B, H, Sq, d)
    grad_output: Tensor,  # (B, N, H, Sq, d)
    logsumexp: Tensor,  # (B, H, Sq)
    row: Tensor,  # (B, N, Sq)
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator on tensors that its checks have passed; see `lvlm_fastxai.ops.attention_backward_relevancy`."""
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    targets = row.shape[1]
    of_queries = batch, targets, heads, queries, width
    of_keys = batch, targets, key_heads, keys, width
    if 0 in (batch, queries, keys):
        return (
            query.new_zeros(of_queries),
            key.new_zeros(of_keys),
            value.new_zeros(of_keys),
            row.new_zeros((batch, targets, keys)),
        )
    chosen = configuration(query.dtype, width)
    query, key, value, output, grad_output = map(with_contiguous_last_axis, (query, key, value, output, grad_output))
    logsumexp, row = logsumexp.contiguous(), row.contiguous()
    alignment = alignment_of(query, key, value, output, grad_output)

    columns = triton.cdiv(width, chosen.columns)
    step, owned_keys = chosen.key_tile
    owned_queries = chosen.query_tile[0]
    key_blocks = triton.cdiv(keys, owned_keys)
    query_blocks = triton.cdiv(queries, owned_queries)
    tiles = key_start.new_empty((batch, key_blocks, triton.cdiv(queries, step)), dtype=torch.int32)
    counts = key_start.new_empty((batch, key_blocks, 2), dtype=torch.int32)
    delta = row.new_empty((batch, targets, heads, queries))
    partial = row.new_empty((batch, targets, key_heads, keys))
    grad_query, grad_key, grad_value = query.new_empty(of_queries), key.new_empty(of_keys), value.new_empty(of_keys)
    grad_strides = grad_output.stride()[:4]
    strides = (
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *grad_strides,
        *key_start.stride(),
        *key_end.stride(),
    )
    # Triton launches on the current device.
    with torch.cuda.device_of(query):
        list_tiles[(batch * key_blocks,)](
            key_start,
            key_end,
            row,
            tiles,
            counts,
            *key_start.stride(),
            *key_end.stride(),
            queries,
            keys,
            targets,
            key_blocks,
            1,
            TARGETS=1,
            BLOCK_Q=step,
            BLOCK_K=owned_keys,
            TILES=TILES_AT_ONCE,
            WEIGHTED=False,
        )
        row_deltas[(batch * targets * heads * query_blocks,)](
            output,
            grad_output,
            delta,
            *output.stride()[:3],
            *grad_strides,
            heads,
            queries,
            targets,
            query_blocks,
            WIDTH=width,
            PIECE=64,
            BLOCK_Q=owned_queries,
            ALIGNMENT=alignment,
        )
        key_gradients[(batch * targets * key_heads * columns * key_blocks,)](
            query,
            key,
            value,
            grad_output,
            logsumexp,
            delta,
            row,
            key_start,
            key_end,
            tiles,
            counts,
            grad_key,
            grad_value,
            partial,
            *strides,
            heads,
            heads // key_heads,
            queries,
            keys,
            targets,
            key_blocks,
            columns,
            scale * LOG2_E,
            scale,
            1 / heads,
            **constants(chosen, width, alignment, chosen.key_tile),
            **launch_options(),
        )
        query_gradients[(batch * targets * heads * columns * query_blocks,)](
            query,
            key,
            value,
            grad_output,
            logsumexp,
            delta,
            key_start,
            key_end,
            grad_query,
            *strides,
            heads,
            heads // key_heads,
            queries,
            keys,
            targets,
            query_blocks,
            columns,
            scale * LOG2_E,
            scale,
            **constants(chosen, width, alignment, chosen.query_tile),
            **launch_options(),
        )
        return grad_query, grad_key, grad_value, partial.sum(dim=2)
