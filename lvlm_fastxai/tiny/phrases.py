"""What each noun phrase of a question speaks of: a second teacher for the decoder, thrown away after training.

A question about two objects ("is the red star left of the small circle?") can be answered only by a decoder that has
found both. The answer, one word long, teaches that search badly: in 3 280 steps without this teacher relation and
comparison did not rise above guessing. So the state of each phrase's last word, half-way up the decoder, must tell how
many objects of the picture the phrase fits and, where it fits one, where that is and how it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from . import scenes
from .data import LABEL_NAMES, LABEL_VALUES, Pool, objects_of
from .model import vocabulary
from .packing import Packed, TokenizedQuestions

ATTRIBUTES = LABEL_NAMES[1:]
_MAX_COUNT = 4


def _attribute_words() -> tuple[dict[int, tuple[int, int]], set[int]]:
    """Token id of an attribute's word to (attribute, value), plural shapes included; ids of words that end a phrase."""
    ids = vocabulary()
    words = {
        ids[word]: (index, value)
        for index, name in enumerate(ATTRIBUTES)
        for value, word in enumerate(LABEL_VALUES[name])
    }
    shape = ATTRIBUTES.index("shape")
    for value, word in enumerate(scenes.SHAPES):
        words[ids["crosses" if word == "cross" else f"{word}s"]] = (shape, value)
    nouns = {token for token, (index, _) in words.items() if index == shape}
    return words, nouns | {ids["object"], ids["objects"]}


_WORDS, _NOUNS = _attribute_words()


def phrases(tokens: Sequence[int]) -> list[tuple[int, dict[int, int]]]:
    """Noun phrases of a question: the place of the noun in ``tokens`` and the value it asks of each attribute."""
    found = []
    for end, token in enumerate(tokens):
        if token not in _NOUNS:
            continue
        asked = dict([_WORDS[token]] if token in _WORDS else [])
        at = end - 1
        while at >= 0 and tokens[at] in _WORDS and tokens[at] not in _NOUNS:
            index, value = _WORDS[tokens[at]]
            asked[index] = value
            at -= 1
        found.append((end, asked))
    return found


@dataclass
class PhraseTargets:
    """What :func:`phrase_loss` asks at each noun.

    Attributes:
        rows: (P,) int64, flat positions (b·S + s) of the nouns.
        count: (P,) int64, how many objects the phrase fits, at most four.
        known: (P,) bool, whether it fits exactly one.
        values: (P, 4) int64, that object's attributes; zeros where not ``known``.
        places: (P, 2) fp32, its centre as seen from the picture's, in units of 32 canvas pixels.
    """

    rows: torch.Tensor
    count: torch.Tensor
    known: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor


def phrase_targets(
    packed: Packed, entries: Sequence[tuple[Pool, int, TokenizedQuestions, np.ndarray] | None]
) -> PhraseTargets | None:
    """Targets of a pack, or None where no noun is in it.

    Args:
        entries: per sequence its picture (pool, row) and the questions packed into it; None for one to leave out.
    """
    size = packed.input_ids.shape[1]
    starts = packed.starts
    rows, counts, values, places = [], [], [], []
    number = 0
    for b, entry in enumerate(entries):
        if entry is None:
            number += packed.blocks[b]
            continue
        pool, row, table, chosen = entry
        present, centers = objects_of(pool, row)
        for q in chosen:
            begin = int(table.start[q])
            tokens = table.tokens[begin : begin + int(table.answer_start[q])].tolist()
            for end, asked in phrases(tokens):
                fits = np.ones(len(present), dtype=bool)
                for index, value in asked.items():
                    fits &= present[:, index] == value
                rows.append(b * size + int(starts[number]) + end)
                counts.append(min(int(fits.sum()), _MAX_COUNT))
                one = int(fits.argmax()) if fits.sum() == 1 else None
                values.append(present[one] if one is not None else np.zeros(len(ATTRIBUTES), dtype=np.int64))
                places.append((centers[one] - scenes.CANVAS / 2) / 32 if one is not None else np.zeros(2))
            number += 1
    if not rows:
        return None
    count = torch.tensor(counts)
    return PhraseTargets(
        torch.tensor(rows),
        count,
        count == 1,
        torch.from_numpy(np.stack(values)),
        torch.from_numpy(np.stack(places).astype(np.float32)),
    )


class PhraseHeads(nn.Module):
    """Linear read-outs of a noun's state: count, attributes, centre. Not part of the shipped model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [_MAX_COUNT + 1, *(len(LABEL_VALUES[name]) for name in ATTRIBUTES), 2]
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        """(P, width) to logits of the count and of each attribute, and the centre (P, 2)."""
        return list(self.linear(self.norm(states.float())).split(self.sizes, dim=-1))


def phrase_loss(
    heads: PhraseHeads, states: torch.Tensor, targets: PhraseTargets
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of the read-outs at the nouns, and how good they are.

    Args:
        states: (B, S, width), half-way up the decoder.
    """
    count, *attributes, places = heads(states.flatten(0, 1)[targets.rows])
    loss = nn.functional.cross_entropy(count, targets.count)
    figures = {"count": float((count.argmax(-1) == targets.count).float().mean())}
    if targets.known.any():
        known = targets.known
        for index, (name, logits) in enumerate(zip(ATTRIBUTES, attributes, strict=True)):
            truth = targets.values[known, index]
            loss = loss + 0.25 * nn.functional.cross_entropy(logits[known], truth)
            figures[name] = float((logits[known].argmax(-1) == truth).float().mean())
        loss = loss + 2 * nn.functional.smooth_l1_loss(places[known], targets.places[known])
        figures["pixels off"] = float((places.detach()[known] - targets.places[known]).norm(dim=-1).mean() * 32)
    return loss, figures
