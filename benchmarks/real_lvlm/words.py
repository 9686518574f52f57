"""Words for patches: the projector learns to say what lies under each patch before the first question is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from lvlm_fastxai.tiny.data import LABEL_VALUES

from .model import Projector
from .pictures import ATTRIBUTES, Pictures

SHARED_WORDS = 0.5
ALIGN_STEPS, ALIGN_PATCHES, ALIGN_RATE = 500, 2048, 2e-3


class PatchWords:
    """What the projector should say of patches, in embeddings of words.

    Args:
        embeddings: (vocabulary, width) of the language model.
    """

    def __init__(self, tokenizer: Any, embeddings: Tensor) -> None:
        self._middle = embeddings.mean(0)
        self._length = 0.7 * (embeddings - self._middle).norm(dim=-1).mean()

        def vectors(words: Sequence[str]) -> Tensor:
            # Each word as it begins a text and as it stands inside one: the first is how answers begin. Words of one
            # group are much alike, "small" and "large" above all: what they share would drown what tells them apart.
            rows = [
                embeddings[[*tokenizer(word)["input_ids"], *tokenizer(f" {word}")["input_ids"]]].mean(0)
                for word in words
            ]
            apart = torch.stack(rows) - self._middle
            shared = apart.mean(0)
            if len(words) == 1:
                return torch.nn.functional.normalize(apart, dim=-1)
            unit = torch.nn.functional.normalize
            return unit(apart - shared, dim=-1) + SHARED_WORDS * unit(shared, dim=-1)

        self._attributes = [vectors(LABEL_VALUES[name]) for name in ATTRIBUTES]
        self._background = vectors(["background"])
        self._sides = torch.cat([vectors(["right", "left"]), vectors(["bottom", "top"])])

    def __call__(self, labels: Tensor, places: Tensor) -> Tensor:
        """Return the words of patches, (n, width).

        Args:
            labels: (n, 5) int64, places: (n, 2), as :class:`~benchmarks.real_lvlm.pictures.Pictures` has them; presence
                must be known.
        """
        owned = labels[:, 0] == 1
        said = self._background.repeat(len(labels), 1)
        there = places[owned].mul(2).clamp(-1, 1)
        sides = there.new_tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]) @ there.T
        said[owned] = sides.relu().T @ self._sides
        for number, vectors in enumerate(self._attributes, start=1):
            said[owned] += vectors[labels[owned, number]]
        return self._middle + self._length * said


def align(projector: Projector, pictures: Pictures, words: PatchWords) -> float:
    """Train the projector to say ``words``; returns the share of the words' variance that it explains."""
    rng = numpy.random.default_rng(1)
    owned, empty = (numpy.argwhere(pictures.labels[:, :, 0] == presence) for presence in (1, 0))
    some = rng.integers(0, len(pictures), 200)
    projector.standardize(torch.from_numpy(pictures.features[some].astype(numpy.float32)).flatten(0, 1))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=ALIGN_RATE, weight_decay=0.01)
    explained = 0.0
    with tqdm(range(ALIGN_STEPS), desc="words for patches", mininterval=5) as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = ALIGN_RATE * 0.5 * (1 + math.cos(math.pi * step / ALIGN_STEPS))
            picked = [each[rng.integers(0, len(each), ALIGN_PATCHES // 2)] for each in (owned, empty)]
            n, patch = numpy.concatenate(picked).T
            labels = torch.from_numpy(pictures.labels[n, patch].astype(numpy.int64))
            wanted = words(labels, torch.from_numpy(pictures.places[n, patch]))
            said = projector(torch.from_numpy(pictures.features[n, patch].astype(numpy.float32)))
            loss = (said - wanted).square().mean() / wanted.var(0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            explained += 0.05 * (1 - loss.item() - explained)
            bar.set_postfix(explained=f"{explained:.3f}", refresh=False)
    return explained
