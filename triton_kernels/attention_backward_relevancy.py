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
from torch import Tensor

from ._attention_backward import key_gradients, query_gradients, row_deltas
from ._tiles import (
    ALIGNMENT,
    INTERPRETED_ROWS,
    LOG2_E,
    alignment_of,
    is_interpreted,
    launch_options,
    listed_tiles,
    strides_of,
    with_contiguous_last_axis,
)

__all__ = ["attention_backward_relevancy", "is_interpreted", "key_gradients", "query_gradients"]


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
    key_blocks, query_blocks = triton.cdiv(keys, chosen.key_tile[1]), triton.cdiv(queries, chosen.query_tile[0])
    delta = row.new_empty((batch, targets, heads, queries))
    partial = row.new_empty((batch, targets, key_heads, keys))
    grad_query, grad_key, grad_value = query.new_empty(of_queries), key.new_empty(of_keys), value.new_empty(of_keys)
    inputs = query, key, value, grad_output, logsumexp, delta
    ranges = key_start, key_end
    strides = *strides_of(query, key, value, grad_output), *key_start.stride(), *key_end.stride()
    sizes = heads, heads // key_heads, queries, keys, targets
    # Triton launches on the current device.
    with torch.cuda.device_of(query):
        lists = listed_tiles(*ranges, row, keys, chosen.key_tile, targets_at_once=1, weighted=False)
        row_deltas[(batch * targets * heads * query_blocks,)](
            *(output, grad_output, delta, *strides_of(output, grad_output)),
            *(heads, queries, targets, query_blocks),
            WIDTH=width,
            PIECE=64,
            BLOCK_Q=chosen.query_tile[0],
            ALIGNMENT=alignment,
        )
        key_gradients[(batch * targets * key_heads * columns * key_blocks,)](
            *(*inputs, row, *ranges, *lists, grad_key, grad_value, partial, *strides),
            *(*sizes, key_blocks, columns, scale * LOG2_E, scale, 1 / heads),
            **constants(chosen, width, alignment, chosen.key_tile),
            **launch_options(),
        )
        query_gradients[(batch * targets * heads * columns * query_blocks,)](
            *(*inputs, *ranges, grad_query, *strides),
            *(*sizes, query_blocks, columns, scale * LOG2_E, scale),
            **constants(chosen, width, alignment, chosen.query_tile),
            **launch_options(),
        )
        return grad_query, grad_key, grad_value, partial.sum(dim=2)
