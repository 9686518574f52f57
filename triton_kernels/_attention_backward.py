"""The kernels of attention_backward_relevancy: its rows' D, dK and dV with the product, and dQ."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tiles import SIZES, as_multiples, digits, load_piece, streamed_product


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
    block, column, key_head, outer = digits(program, key_blocks, columns, key_heads)
    key_head, target, sample = key_head.to(tl.int64), (outer % targets).to(tl.int64), (outer // targets).to(tl.int64)
    first_key = block * BLOCK_K
    query_steps = as_multiples(query_stride_b, query_stride_h, query_stride_i, ALIGNMENT)
    key_steps = as_multiples(key_stride_b, key_stride_h, key_stride_j, ALIGNMENT)
    value_steps = as_multiples(value_stride_b, value_stride_h, value_stride_j, ALIGNMENT)
    grad_steps = as_multiples(grad_stride_b, grad_stride_h, grad_stride_i, ALIGNMENT)
    grad_stride_n = grad_stride_n // ALIGNMENT * ALIGNMENT

    query += sample * query_steps[0] + key_head * group * query_steps[1]
    key += sample * key_steps[0] + key_head * key_steps[1] + first_key.to(tl.int64) * key_steps[2]
    value += sample * value_steps[0] + key_head * value_steps[1] + first_key.to(tl.int64) * value_steps[2]
    grad_output += sample * grad_steps[0] + target * grad_stride_n + key_head * group * grad_steps[1]
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
        key_rows = load_piece(key, key_steps[2], inside, 0, COLUMNS, WIDTH, BLOCK_K)
        value_rows = load_piece(value, value_steps[2], inside, 0, COLUMNS, WIDTH, BLOCK_K)
    else:
        first_column = column * COLUMNS
        key_rows = key
        value_rows = value

    key_sums = tl.zeros((BLOCK_K, COLUMNS), tl.float32)
    value_sums = tl.zeros((BLOCK_K, COLUMNS), tl.float32)
    product = tl.zeros((BLOCK_K,), tl.float32)
    # Tiles without a mask come first.
    for _ in range(group):
        for MASKED in tl.static_range(2):
            for position in range(tile_count - part_count if MASKED else 0, tile_count if MASKED else whole_count):
                key_sums, value_sums, product = add_tile_of_rows(
                    key_sums, value_sums, product, tl.load(tiles + position), first_key, first_column, key_rows,
                    key_steps[2], value_rows, value_steps[2], query, query_steps[2], grad_output,
                    grad_steps[2], logsumexp, delta, row, key_start, key_end, start_stride_i, end_stride_i, queries,
                    keys, score_scale, WIDTH, COLUMNS, PIECE, RESIDENT, BLOCK_Q, BLOCK_K, MASKED,
                )  # fmt: skip
        query += query_steps[1]
        grad_output += grad_steps[1]
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
    block, column, head, outer = digits(program, query_blocks, columns, heads)
    head, target, sample = head.to(tl.int64), (outer % targets).to(tl.int64), (outer // targets).to(tl.int64)
    block = query_blocks - 1 - block
    first_query = block.to(tl.int64) * BLOCK_Q
    query_steps = as_multiples(query_stride_b, query_stride_h, query_stride_i, ALIGNMENT)
    key_steps = as_multiples(key_stride_b, key_stride_h, key_stride_j, ALIGNMENT)
    value_steps = as_multiples(value_stride_b, value_stride_h, value_stride_j, ALIGNMENT)
    grad_steps = as_multiples(grad_stride_b, grad_stride_h, grad_stride_i, ALIGNMENT)
    grad_stride_n = grad_stride_n // ALIGNMENT * ALIGNMENT

    query += sample * query_steps[0] + head * query_steps[1] + first_query * query_steps[2]
    key += sample * key_steps[0] + head // group * key_steps[1]
    value += sample * value_steps[0] + head // group * value_steps[1]
    grad_output += sample * grad_steps[0] + target * grad_stride_n + head * grad_steps[1] + first_query * grad_steps[2]
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
        query_rows = load_piece(query, query_steps[2], seeing, 0, COLUMNS, WIDTH, BLOCK_Q)
        grad_rows = load_piece(grad_output, grad_steps[2], seeing, 0, COLUMNS, WIDTH, BLOCK_Q)
    else:
        first_column = column * COLUMNS
    sums = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    for first_key in range(first_seen // BLOCK_K * BLOCK_K, last_seen, BLOCK_K):
        j = first_key + tl.arange(0, BLOCK_K)
        seen = (j >= first_seen) & (j < last_seen)
        keys_here = key + tl.cast(first_key, tl.int64) * key_steps[2]
        values_here = value + tl.cast(first_key, tl.int64) * value_steps[2]
        key_tile = load_piece(keys_here, key_steps[2], seen, first_column, COLUMNS, WIDTH, BLOCK_K)
        if RESIDENT:
            value_tile = load_piece(values_here, value_steps[2], seen, 0, COLUMNS, WIDTH, BLOCK_K)
            score = tl.dot(query_rows, tl.trans(key_tile))
            change = tl.dot(grad_rows, tl.trans(value_tile))
        else:
            score = streamed_product(
                query, query_steps[2], seeing, keys_here, key_steps[2], seen, PIECE, WIDTH, BLOCK_Q, BLOCK_K
            )
            change = streamed_product(
                grad_output, grad_steps[2], seeing, values_here, value_steps[2], seen, PIECE, WIDTH, BLOCK_Q, BLOCK_K
            )
        probability = tl.exp2(score * score_scale - total[:, None])
        visible = (j[None, :] - start[:, None]).to(tl.uint32) < length[:, None]
        grad_score = tl.where(visible, probability * (change - correction[:, None]), 0.0)
        sums = tl.dot(grad_score.to(key_tile.dtype), key_tile, sums, input_precision="ieee")

    grad_query += (of_head * queries + first_query) * WIDTH
    store_piece(grad_query, sums * scale, inside, first_column, COLUMNS, WIDTH, BLOCK_Q)
