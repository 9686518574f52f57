"""Many questions about a picture at once, end to end without padding, and the attention among them.

As in the shipped LVLM's training (``lvlm_fastxai/tiny/packing.py``) each question sees the picture's tokens and itself,
at the positions it would have alone. Here the attention is also computed that way, the picture's tokens among
themselves and each question's against the picture and itself, instead of under a mask: with 16 questions behind 256
image tokens a mask would hide three of four scores that had been computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Block:
    """One question as tokens: what stands behind the image tokens, and where in it the answer begins."""

    tokens: list[int]
    answer: int


@dataclass
class Packed:
    """Questions about B pictures, end to end without padding: T tokens, N questions of at most L tokens.

    Attributes:
        tokens, positions: (T,) int64; the tokens under the picture's are 0.
        images: (B x patches,) int64, where the image tokens stand.
        prefix: (B, P) int64, where each picture's prefix stands.
        blocks: (N, L) int64, where each question's tokens stand; 0 behind its end.
        filled: (N, L) bool, which of those are its own.
        picture: (N,) int64, whose prefix each question sees.
        rows, targets, question: (A,) int64, positions whose next token is an answer's, that token, its question.
    """

    tokens: Tensor
    positions: Tensor
    images: Tensor
    prefix: Tensor
    blocks: Tensor
    filled: Tensor
    picture: Tensor
    rows: Tensor
    targets: Tensor
    question: Tensor


def pack(before: Sequence[int], total: int, patches: Tensor, pictures: Sequence[Sequence[Block]]) -> Packed:
    """Lay out ``before``, then image tokens, then each question of each picture.

    Args:
        total: how many patches a picture has.
        patches: (B, K) int64, which of them are there, ascending; each keeps the position it has among all of them.
    """
    first, size = len(before), len(before) + patches.shape[1]
    tokens: list[int] = []
    positions: list[int] = []
    prefix, places, owners, rows, targets, question = [], [], [], [], [], []
    for number, (kept, asked) in enumerate(zip(patches.tolist(), pictures, strict=True)):
        prefix.append(list(range(len(tokens), len(tokens) + size)))
        tokens += [*before, *[0] * len(kept)]
        positions += [*range(first), *(first + patch for patch in kept)]
        for block in asked:
            start = len(tokens)
            places.append(list(range(start, start + len(block.tokens))))
            tokens += block.tokens
            positions += range(first + total, first + total + len(block.tokens))
            rows += range(start + block.answer - 1, start + len(block.tokens) - 1)
            targets += block.tokens[block.answer :]
            question += [len(owners)] * (len(block.tokens) - block.answer)
            owners.append(number)
    longest = max(map(len, places))
    lengths = torch.tensor([len(each) for each in places])
    all_prefixes = torch.tensor(prefix)
    return Packed(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        images=all_prefixes[:, first:].reshape(-1),
        prefix=all_prefixes,
        blocks=torch.tensor([[*each, *[0] * (longest - len(each))] for each in places]),
        filled=torch.arange(longest)[None, :] < lengths[:, None],
        picture=torch.tensor(owners),
        rows=torch.tensor(rows),
        targets=torch.tensor(targets),
        question=torch.tensor(question),
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """Attend causally in every picture's prefix, and from every question to its prefix and itself; (T, heads, d).

    Args:
        query: (T, heads, d).
        key, value: (T, key-value heads, d).
    """
    heads, groups = query.shape[1], key.shape[1]
    size, (count, longest) = packed.prefix.shape[1], packed.blocks.shape
    # index_select: the gradient of plain indexing is an order of magnitude slower on the CPU.
    p_query, p_key, p_value = (_grouped(each, packed.prefix, groups) for each in (query, key, value))
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    seen = _attend(p_query, p_key, p_value, causal.repeat(heads // groups, 1))
    b_query, b_key, b_value = (_grouped(each, packed.blocks, groups) for each in (query, key, value))
    b_key, b_value = (
        torch.cat([prefix.index_select(0, packed.picture), own], 2)
        for prefix, own in ((p_key, b_key), (p_value, b_value))
    )
    own = packed.filled[:, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()  # (N, L, L)
    mask = torch.cat([own.new_ones(count, longest, size), own], 2).repeat(1, heads // groups, 1)[:, None]
    asked = _attend(b_query, b_key, b_value, mask)
    out = torch.zeros_like(query).index_copy(0, packed.prefix.reshape(-1), _ungrouped(seen, size))
    filled = packed.filled.reshape(-1).nonzero()[:, 0]
    return out.index_copy(0, packed.blocks[packed.filled], _ungrouped(asked, longest).index_select(0, filled))


def _grouped(states: Tensor, places: Tensor, groups: int) -> Tensor:
    """(n, groups, heads / groups x L, d) at ``places`` (n, L): query heads of one key head are more rows of it."""
    n, length = places.shape
    taken = states.index_select(0, places.reshape(-1)).view(n, length, groups, -1, states.shape[-1])
    return taken.permute(0, 2, 3, 1, 4).reshape(n, groups, -1, states.shape[-1])


def _ungrouped(states: Tensor, length: int) -> Tensor:
    """(n x L, heads, d), the way back."""
    n, groups, _, width = states.shape
    return states.view(n, groups, -1, length, width).permute(0, 3, 1, 2, 4).reshape(n * length, -1, width)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    # Spelt out: the backward of the fused one takes three times as long on the CPU for rows this short.
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
