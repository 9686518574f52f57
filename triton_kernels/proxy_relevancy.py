"""proxy_relevancy in Triton: the states are read once, and what is left are S numbers a row.

Two launches. The first writes the scores into the map: for one query, programs own a few whole columns and add up
products, bound by memory; for several, tiles of columns and queries. In the second, each program turns the scores of
one row into its map and entropies.

A centred column is shifted by the mean of its start, which is at most √(D / start) deviations from the mean of all:
neither the variance nor the product is then lost to cancellation, and a column is read once all the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import (
    INTERPRETED_ROWS,
    SIZES,
    alignment_of,
    is_interpreted,
    launch_options,
    load_piece,
    with_contiguous_last_axis,
)

__all__ = ["is_interpreted", "proxy_relevancy"]

# Numbers of a row that one step of `finish_rows` looks at.
ROW_PIECE = 1024
# Numbers of a column that one step of `column_scores` may look at.
PIECES = (512, 1024, 2048, 4096, 8192)


@triton.jit
def normalised(product, weight, total, squares, offset, eps, WIDTH: tl.constexpr, CENTERED: tl.constexpr):
    """Scores from sums over the states less their shift: of states · query, of the query, of states, of squares."""
    variance = squares / WIDTH
    if CENTERED:
        mean = total / WIDTH
        product -= mean * weight
        variance -= mean * mean
    return product * tl.rsqrt(variance + eps) + offset


@triton.jit(do_not_specialize=SIZES)
def column_scores(
    hidden,  # (B, S, D)
    query,  # (B, 1, D) contiguous
    offset,  # (B, 1) contiguous
    lengths,  # (B,)
    scores,  # (B, 1, S) contiguous
    hidden_stride_b,
    hidden_stride_j,
    columns,
    eps,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CENTERED: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_column = tl.program_id(0) % blocks * COLUMNS
    count = tl.load(lengths + sample) - first_column
    constant = tl.load(offset + sample)
    hidden += sample * (hidden_stride_b // ALIGNMENT * ALIGNMENT)
    hidden += first_column.to(tl.int64) * (hidden_stride_j // ALIGNMENT * ALIGNMENT)
    query += sample * WIDTH
    i = tl.arange(0, COLUMNS)
    # The same numbers for every column: read as a tile like the states', they are where a thread needs them.
    k = tl.broadcast_to(tl.arange(0, PIECE)[None, :], (COLUMNS, PIECE))

    # A thread has sums of its own until the end: no thread waits for another between two pieces.
    product = tl.zeros((COLUMNS, PIECE), tl.float32)
    squares = tl.zeros((COLUMNS, PIECE), tl.float32)
    total = tl.zeros((COLUMNS, PIECE), tl.float32)
    weight = tl.zeros((COLUMNS, PIECE), tl.float32)
    shift = tl.zeros((COLUMNS,), tl.float32)
    for first in tl.static_range(0, WIDTH, PIECE):
        states = load_piece(hidden, hidden_stride_j // ALIGNMENT * ALIGNMENT, i < count, first, PIECE, WIDTH, COLUMNS)
        states = states.to(tl.float32)
        folded = tl.load(query + first + k, mask=first + k < WIDTH, other=0.0)
        if CENTERED:
            if first == 0:
                shift = tl.sum(states, axis=1) / min(PIECE, WIDTH)
            states = tl.where(first + k < WIDTH, states - shift[:, None], 0.0)
            total += states
            weight += folded
        product += states * folded
        squares += states * states
    score = normalised(
        tl.sum(product, axis=1),
        tl.sum(weight, axis=1),
        tl.sum(total, axis=1),
        tl.sum(squares, axis=1),
        constant,
        eps,
        WIDTH,
        CENTERED,
    )
    tl.store(scores + sample * columns + first_column + i, score, mask=i < count)


@triton.jit(do_not_specialize=SIZES)
def tile_scores(
    hidden,  # (B, S, D)
    query,  # (B, N, D) contiguous
    offset,  # (B, N) contiguous
    lengths,  # (B,)
    scores,  # (B, N, S) contiguous
    hidden_stride_b,
    hidden_stride_j,
    columns,
    targets,
    eps,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    START: tl.constexpr,
    COLUMNS: tl.constexpr,
    TARGETS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CENTERED: tl.constexpr,
):
    # Programs that read the same columns follow one another.
    blocks = tl.cdiv(columns, COLUMNS)
    chunks = tl.cdiv(targets, TARGETS)
    first_target = tl.program_id(0) % chunks * TARGETS
    first_column = tl.program_id(0) // chunks % blocks * COLUMNS
    sample = (tl.program_id(0) // chunks // blocks).to(tl.int64)
    count = tl.load(lengths + sample) - first_column
    hidden_stride_j = hidden_stride_j // ALIGNMENT * ALIGNMENT
    hidden += sample * (hidden_stride_b // ALIGNMENT * ALIGNMENT) + first_column.to(tl.int64) * hidden_stride_j
    row = sample * targets + first_target
    query += row * WIDTH
    i = tl.arange(0, COLUMNS)
    n = tl.arange(0, TARGETS)
    inside = i < count
    real = n < targets - first_target

    product = tl.zeros((COLUMNS, TARGETS), tl.float32)
    squares = tl.zeros((COLUMNS, PIECE), tl.float32)
    total = tl.zeros((COLUMNS, PIECE), tl.float32)
    weight = tl.zeros((TARGETS, PIECE), tl.float32)
    shift = tl.zeros((COLUMNS,), tl.float32)
    if CENTERED:
        for first in range(0, min(START, WIDTH), PIECE):
            total += load_piece(hidden, hidden_stride_j, inside, first, PIECE, WIDTH, COLUMNS).to(tl.float32)
        shift = tl.sum(total, axis=1) / min(START, WIDTH)
        total = tl.zeros((COLUMNS, PIECE), tl.float32)
    for first in range(0, WIDTH, PIECE):
        states = load_piece(hidden, hidden_stride_j, inside, first, PIECE, WIDTH, COLUMNS).to(tl.float32)
        folded = load_piece(query, WIDTH, real, first, PIECE, WIDTH, TARGETS)
        if CENTERED:
            states = tl.where(first + tl.arange(0, PIECE)[None, :] < WIDTH, states - shift[:, None], 0.0)
            total += states
            weight += folded
        squares += states * states
        product = tl.dot(states, tl.trans(folded), product, input_precision="ieee")
    score = normalised(
        product,
        tl.sum(weight, axis=1)[None, :],
        tl.sum(total, axis=1)[:, None],
        tl.sum(squares, axis=1)[:, None],
        tl.load(offset + row + n, mask=real, other=0.0)[None, :],
        eps,
        WIDTH,
        CENTERED,
    )
    address = scores + row * columns + first_column + tl.cast(n, tl.int64)[None, :] * columns + i[:, None]
    tl.store(address, score, mask=inside[:, None] & real[None, :])


@triton.jit
def log_sigmoid(score):
    return tl.minimum(score, 0.0) - tl.log(1 + tl.exp(-tl.abs(score)))


@triton.jit(do_not_specialize=SIZES)
def finish_rows(
    scores,  # (B, N, S) contiguous: becomes the map
    entropy,  # (B, N) contiguous
    bernoulli,  # (B, N) contiguous
    lengths,  # (B,)
    columns,
    targets,
    SOFTMAX: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(lengths + row // targets)
    scores += row * columns
    i = tl.arange(0, PIECE)

    highest = tl.full((PIECE,), float("-inf"), tl.float32)
    for first in range(0, count, PIECE):
        score = tl.load(scores + first + i, mask=first + i < count, other=float("-inf"))
        highest = tl.maximum(highest, score)
    # It also stands in for the columns that there are not: nothing overflows there.
    best = tl.where(count > 0, tl.max(highest, axis=0), 0.0)
    # The logarithms of both maps rise with the score, that of softmax known but for a constant.
    top = best if SOFTMAX else log_sigmoid(best)

    total = tl.zeros((PIECE,), tl.float32)
    weighted = tl.zeros((PIECE,), tl.float32)
    for first in range(0, count, PIECE):
        log_map = tl.load(scores + first + i, mask=first + i < count, other=best)
        if not SOFTMAX:
            log_map = log_sigmoid(log_map)
        share = tl.where(first + i < count, tl.exp(log_map - top), 0.0)
        total += share
        weighted += share * (log_map - top)
    # Of no columns 1, so that their entropy is 0.
    whole = tl.where(count > 0, tl.sum(total, axis=0), 1.0)
    log_total = tl.log(whole)
    spread = log_total - tl.sum(weighted, axis=0) / whole

    uncertain = tl.zeros((PIECE,), tl.float32)
    for first in range(0, columns, PIECE):
        inside = first + i < count
        score = tl.load(scores + first + i, mask=inside, other=best)
        if SOFTMAX:
            log_map = score - top - log_total
            relevancy = tl.exp(log_map)
            rest = 1 - relevancy
            # The smallest normal number: 0 · log 0 is 0.
            part = -relevancy * log_map - rest * tl.log(tl.maximum(rest, 1.1754944e-38))
        else:
            small = tl.exp(-tl.abs(score))
            relevancy = tl.where(score < 0, small, 1.0) / (1 + small)
            part = tl.log(1 + small) + tl.abs(score) * small / (1 + small)
        uncertain += tl.where(inside, part, 0.0)
        tl.store(scores + first + i, tl.where(inside, relevancy, 0.0), mask=first + i < columns)
    known = tl.maximum(count, 1).to(tl.float32)
    tl.store(entropy + row, spread / tl.log(tl.maximum(known, 2.0)))
    tl.store(bernoulli + row, tl.sum(uncertain, axis=0) / (known * 0.6931471805599453))


class Configuration(NamedTuple):
    """How the scores' kernel is compiled for one problem; `targets` is 1 for `column_scores`."""

    columns: int
    targets: int
    piece: int  # of the width that is read at a time
    start: int  # of the width that the shift of centred columns is the mean of


def configuration(dtype: torch.dtype, width: int, targets: int) -> Configuration:
    """Tiles that do not spill registers; `make triton` checks that for every architecture."""
    if targets == 1:
        # The least padding, then the longest: whole columns of most models, at once.
        padded, piece = min((triton.cdiv(width, piece) * piece, -piece) for piece in PIECES)
        columns = INTERPRETED_ROWS if is_interpreted() else max(1, 4096 // padded, 2048 // -piece)
        return Configuration(columns, 1, -piece, -piece)
    if is_interpreted():
        return Configuration(INTERPRETED_ROWS, 16, 128, 512)
    # A cache line of every column, 128 bytes.
    return Configuration(32, 16 if targets <= 16 else 32, 32 if dtype == torch.float32 else 64, 512)


def constants(configuration: Configuration, width: int, alignment: int, centered: bool) -> dict[str, Any]:
    """The compile-time arguments of the scores' kernel."""
    found = {
        "WIDTH": width,
        "PIECE": configuration.piece,
        "COLUMNS": configuration.columns,
        "ALIGNMENT": alignment,
        "CENTERED": centered,
    }
    if configuration.targets == 1:
        return found
    return {**found, "TARGETS": configuration.targets, "START": configuration.start}


def proxy_relevancy(
    hidden: Tensor,  # (B, S, D)
    query: Tensor,  # (B, N, D)
    offset: Tensor,  # (B, N)
    lengths: Tensor,  # (B,)
    eps: float,
    centered: bool,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on tensors that its checks have passed; see `lvlm_fastxai.ops.proxy_relevancy`."""
    batch, columns, width = hidden.shape
    targets = query.shape[1]
    relevancy = query.new_empty((batch, targets, columns))
    if 0 in (batch, targets, columns):
        return relevancy, offset.new_zeros((batch, targets)), offset.new_zeros((batch, targets))
    entropy, bernoulli = offset.new_empty((batch, targets)), offset.new_empty((batch, targets))
    chosen = configuration(hidden.dtype, width, targets)
    hidden = with_contiguous_last_axis(hidden)
    query, offset = query.contiguous(), offset.contiguous()
    lengths = lengths.clamp(0, hidden.shape[1]).contiguous()
    shared = constants(chosen, width, alignment_of(hidden, query), centered) | launch_options()
    blocks = triton.cdiv(columns, chosen.columns)
    states = (hidden, query, offset, lengths, relevancy, *hidden.stride()[:2], columns)
    # Triton launches on the current device.
    with torch.cuda.device_of(hidden):
        if targets == 1:
            column_scores[(batch * blocks,)](*states, eps, **shared)
        else:
            tile_scores[(batch * blocks * triton.cdiv(targets, chosen.targets),)](*states, targets, eps, **shared)
        finish_rows[(batch * targets,)](
            relevancy,
            entropy,
            bernoulli,
            lengths,
            columns,
            targets,
            SOFTMAX=softmax,
            PIECE=ROW_PIECE,
            **launch_options(),
        )
    return relevancy, entropy, bernoulli
