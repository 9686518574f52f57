"""relevancy_product in Triton: column sums of recomputed score tiles, without an S×S tensor and without atomics.

Three launches. The first lists, for every block of keys, the tiles of query rows that see any of it; tiles that see
all of it with every weight come first and need no mask. In the second each program owns one block of keys of one head:
it walks its list, recomputes the scores of a tile once for all its targets, and keeps the column sums in registers. The
third adds the heads up. Nothing depends on the order in which programs run: a result is the same bit by bit every time.

Tiles are (keys, query rows): the columns of a matrix product's result lie inside a thread, so that the sum over query
rows needs two shuffles at its end.
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
    alignment_of,
    as_multiples,
    digits,
    is_interpreted,
    launch_options,
    listed_tiles,
    load_columns,
    load_rows,
    pieces,
    streamed_product,
    strides_of,
    with_contiguous_last_axis,
)

__all__ = ["is_interpreted", "relevancy_product"]


@triton.jit
def add_tile(
    sums,  # one (BLOCK_K,) per target
    tile,
    first_key,
    key,  # of this block: the address when streamed, else the two pieces
    key_stride,
    value,
    value_stride,
    query,  # of this head
    query_stride,
    grad_output,  # of this head and the first target
    grad_stride_n,
    grad_stride,
    logsumexp,
    row,
    key_start,
    key_end,
    start_stride,
    end_stride,
    queries,
    keys,
    target_count,
    score_scale,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    RESIDENT: tl.constexpr,
    SHARED_GRADIENT: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    first_query = tile.to(tl.int64) * BLOCK_Q
    count = queries - tile * BLOCK_Q
    i = tl.arange(0, BLOCK_Q)
    inside = i < count
    key_rows = tl.arange(0, BLOCK_K) < keys - first_key
    query += first_query * query_stride
    grad_output += first_query * grad_stride
    row += first_query

    if RESIDENT:
        score = tl.dot(key[0], load_columns(query, query_stride, count, 0, LOW, WIDTH, BLOCK_Q, MASKED))
        if HIGH:
            score = tl.dot(key[1], load_columns(query, query_stride, count, LOW, HIGH, WIDTH, BLOCK_Q, MASKED), score)
    else:
        score = streamed_product(key, key_stride, key_rows, query, query_stride, inside, LOW, WIDTH, BLOCK_K, BLOCK_Q)
    if MASKED:
        total = tl.load(logsumexp + first_query + i, mask=inside, other=0.0)
        start = tl.load(key_start + (first_query + i) * start_stride, mask=inside, other=0)
        end = tl.load(key_end + (first_query + i) * end_stride, mask=inside, other=0)
        start = tl.maximum(start, 0)
        # A single comparison of unsigned numbers then says whether start <= j < end.
        length = tl.maximum(tl.minimum(end, keys) - start, 0)
        distance = (first_key + tl.arange(0, BLOCK_K)[:, None] - start[None, :]).to(tl.uint32)
    else:
        total = tl.load(logsumexp + first_query + i)
    probability = tl.exp2(score * score_scale - (total * 1.4426950408889634)[None, :])

    positive = probability
    result = ()
    for n in tl.static_range(TARGETS):
        if n == 0 or not SHARED_GRADIENT:
            # A program's last targets may not exist; their sums are not stored.
            gradient = grad_output + min(n, target_count - 1) * grad_stride_n
            if RESIDENT:
                change = tl.dot(value[0], load_columns(gradient, grad_stride, count, 0, LOW, WIDTH, BLOCK_Q, MASKED))
                if HIGH:
                    change = tl.dot(
                        value[1],
                        load_columns(gradient, grad_stride, count, LOW, HIGH, WIDTH, BLOCK_Q, MASKED),
                        change,
                    )
            else:
                change = streamed_product(
                    value, value_stride, key_rows, gradient, grad_stride, inside, LOW, WIDTH, BLOCK_K, BLOCK_Q
                )
            # Keeps NaN, as torch.clamp does.
            positive = tl.maximum(probability * change, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weight_address = row + min(n, target_count - 1) * queries + i
        if MASKED:
            weight = tl.load(weight_address, mask=inside, other=0.0)
            # What is hidden or weighs nothing counts for nothing, even where it is not finite.
            visible = distance < tl.where(weight != 0, length, 0).to(tl.uint32)[None, :]
            share = tl.where(visible, positive * weight[None, :], 0.0)
        else:
            share = positive * tl.load(weight_address)[None, :]
        result = result + (sums[n] + tl.sum(share, axis=1),)  # type: ignore[assignment]
    return result


@triton.jit(do_not_specialize=SIZES)
def column_sums(
    query,  # (B, H, Sq, d)
    key,  # (B, Hkv, Sk, d)
    value,  # (B, Hkv, Sk, d)
    grad_output,  # (B, N or 1, H, Sq, d)
    logsumexp,  # (B, H, Sq) contiguous
    row,  # (B, N, Sq) contiguous
    key_start,  # (B, Sq)
    key_end,  # (B, Sq)
    tiles,
    counts,
    partial,  # (B, H, N, Sk)
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
    chunks,
    score_scale,
    head_share,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    RESIDENT: tl.constexpr,
    SHARED_GRADIENT: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides every stride of the four
):
    # Blocks of keys run fastest: the programs alive at a time share the queries of a few heads in the cache, and under
    # a causal mask a head's heavy blocks come first, so that only the last head's light ones trail.
    program = tl.program_id(0)
    block, head, chunk, sample = digits(program, key_blocks, heads, chunks)
    sample = sample.to(tl.int64)
    key_head = head // group
    first_key = block * BLOCK_K
    first_target = chunk * TARGETS
    query_steps = as_multiples(query_stride_b, query_stride_h, query_stride_i, ALIGNMENT)
    key_steps = as_multiples(key_stride_b, key_stride_h, key_stride_j, ALIGNMENT)
    value_steps = as_multiples(value_stride_b, value_stride_h, value_stride_j, ALIGNMENT)
    grad_steps = as_multiples(grad_stride_b, grad_stride_h, grad_stride_i, ALIGNMENT)
    grad_stride_n = grad_stride_n // ALIGNMENT * ALIGNMENT

    query += sample * query_steps[0] + head.to(tl.int64) * query_steps[1]
    key += sample * key_steps[0] + key_head.to(tl.int64) * key_steps[1] + first_key.to(tl.int64) * key_steps[2]
    value += sample * value_steps[0] + key_head.to(tl.int64) * value_steps[1] + first_key.to(tl.int64) * value_steps[2]
    grad_output += sample * grad_steps[0] + head.to(tl.int64) * grad_steps[1]
    if not SHARED_GRADIENT:
        grad_output += first_target.to(tl.int64) * grad_stride_n
    logsumexp += (sample * heads + head) * queries
    row += (sample * targets + first_target) * queries
    key_start += sample * start_stride_b
    key_end += sample * end_stride_b
    tile_count = tl.cdiv(queries, BLOCK_Q)
    listed = (sample * chunks + chunk) * key_blocks + block
    tiles += listed * tile_count
    whole_count = tl.load(counts + listed * 2)
    part_count = tl.load(counts + listed * 2 + 1)

    key_rows = key
    value_rows = value
    if RESIDENT:
        left = keys - first_key
        if HIGH:
            key_rows = (
                load_rows(key, key_steps[2], left, 0, LOW, WIDTH, BLOCK_K),
                load_rows(key, key_steps[2], left, LOW, HIGH, WIDTH, BLOCK_K),
            )
            value_rows = (
                load_rows(value, value_steps[2], left, 0, LOW, WIDTH, BLOCK_K),
                load_rows(value, value_steps[2], left, LOW, HIGH, WIDTH, BLOCK_K),
            )
        else:
            key_rows = (load_rows(key, key_steps[2], left, 0, LOW, WIDTH, BLOCK_K),)
            value_rows = (load_rows(value, value_steps[2], left, 0, LOW, WIDTH, BLOCK_K),)

    sums = ()
    for _ in tl.static_range(TARGETS):
        sums = sums + (tl.zeros((BLOCK_K,), tl.float32),)  # type: ignore[assignment]
    # Tiles without a mask come first.
    for MASKED in tl.static_range(2):
        for position in range(tile_count - part_count if MASKED else 0, tile_count if MASKED else whole_count):
            sums = add_tile(
                sums, tl.load(tiles + position), first_key, key_rows, key_steps[2], value_rows, value_steps[2],
                query, query_steps[2], grad_output, grad_stride_n, grad_steps[2], logsumexp, row, key_start,
                key_end, start_stride_i, end_stride_i, queries, keys, targets - first_target, score_scale,
                WIDTH, LOW, HIGH, RESIDENT, SHARED_GRADIENT, TARGETS, BLOCK_Q, BLOCK_K, MASKED,
            )  # fmt: skip

    j = first_key + tl.arange(0, BLOCK_K)
    partial += (sample * heads + head) * targets * keys
    for n in tl.static_range(TARGETS):
        if first_target + n < targets:
            tl.store(partial + (first_target + n).to(tl.int64) * keys + j, sums[n] * head_share, mask=j < keys)


class Configuration(NamedTuple):
    """How `column_sums` is compiled for one problem."""

    block_q: int
    block_k: int
    low: int  # a head width is the sum of two powers of two, rounded up: 72 and 80 are 64 + 16, 96 is 64 + 32
    high: int
    resident: bool  # keys and values stay on the chip while a program runs; else they are read piece by piece
    targets: int  # that share a recomputed score tile


def targets_per_program(targets: int, shared_gradient: bool, width: int = 128) -> int:
    """How many targets share a score tile: the least work, a product for the scores and one for each gradient."""
    # More would spill registers.
    if shared_gradient:
        return min(targets, 8 if width <= 128 else 2)
    most = 2 if width <= 128 else 1
    return min(range(1, most + 1), key=lambda shared: (-(-targets // shared) * (1 + shared), shared))


def configuration(dtype: torch.dtype, width: int, targets: int, shared_gradient: bool) -> Configuration:
    """Tiles that neither spill registers nor exceed shared memory; `make triton` checks that for every architecture."""
    shared = targets_per_program(targets, shared_gradient, width)
    # Rows that are not read 16 bytes at a time pass through registers on their way to shared memory.
    block_q = INTERPRETED_ROWS if is_interpreted() else 32 if width % ALIGNMENT == 0 else 16
    if dtype == torch.float32 or width > 256:
        return Configuration(block_q, 64, min(block_q, 64 if is_interpreted() else 32), 0, False, shared)
    low, high = pieces(width)
    return Configuration(block_q, 128 if shared == 1 and width <= 128 else 64, low, high, True, shared)


def constants(configuration: Configuration, width: int, shared_gradient: bool, alignment: int) -> dict[str, Any]:
    """The compile-time arguments of `column_sums`."""
    return {
        "WIDTH": width,
        "LOW": configuration.low,
        "HIGH": configuration.high,
        "RESIDENT": configuration.resident,
        "SHARED_GRADIENT": shared_gradient,
        "TARGETS": configuration.targets,
        "BLOCK_Q": configuration.block_q,
        "BLOCK_K": configuration.block_k,
        "ALIGNMENT": alignment,
    }


def relevancy_product(
    query: Tensor,  # (B, H, Sq, d)
    key: Tensor,  # (B, Hkv, Sk, d)
    value: Tensor,  # (B, Hkv, Sk, d)
    grad_output: Tensor,  # (B, N or 1, H, Sq, d)
    logsumexp: Tensor,  # (B, H, Sq)
    row: Tensor,  # (B, N, Sq)
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    scale: float,
) -> Tensor:
    """The operator on tensors that its checks have passed; see `lvlm_fastxai.ops.relevancy_product`."""
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    targets = row.shape[1]
    if 0 in (batch, queries, keys):
        return row.new_zeros((batch, targets, keys))
    shared_gradient = grad_output.shape[1] == 1 and targets > 1
    chosen = configuration(query.dtype, width, targets, shared_gradient)
    query, key, value, grad_output = map(with_contiguous_last_axis, (query, key, value, grad_output))
    logsumexp, row = logsumexp.contiguous(), row.contiguous()

    key_blocks, chunks = triton.cdiv(keys, chosen.block_k), triton.cdiv(targets, chosen.targets)
    tile = chosen.block_q, chosen.block_k
    partial = row.new_empty((batch, heads, targets, keys))
    # Triton launches on the current device.
    with torch.cuda.device_of(query):
        lists = listed_tiles(key_start, key_end, row, keys, tile, targets_at_once=chosen.targets, weighted=True)
        column_sums[(batch * chunks * heads * key_blocks,)](
            *(query, key, value, grad_output, logsumexp, row, key_start, key_end, *lists, partial),
            *(*strides_of(query, key, value, grad_output), *key_start.stride(), *key_end.stride()),
            *(heads, heads // key_heads, queries, keys, targets, key_blocks, chunks),
            *(scale * LOG2_E, 1 / heads),
            **constants(chosen, width, shared_gradient, alignment_of(query, key, value, grad_output)),
            **launch_options(),
        )
        return partial.sum(dim=1)
