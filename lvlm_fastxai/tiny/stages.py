"""The two stages of training the shipped LVLM: patch labels for the vision tower, then answers for all of it."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from ..files import write_whole
from ..training.checkpoints import Checkpoint, Generator
from ..training.metrics import Smoothed
from ..training.schedule import Average, warm_up_then_fall
from ..training.stopping import Stop
from .accuracy import packed_accuracy, show
from .data import KINDS, Pool
from .model import build_model
from .optimizers import Optimizers, Workers, deal
from .packing import TokenizedQuestions, answer_logits, normalize, pack, tokenize
from .patches import PatchHeads, patch_loss, patch_targets
from .phrases import PhraseHeads, phrase_loss, phrase_targets
from .settings import Settings


@dataclass(frozen=True)
class TrainingData:
    """The pictures and questions of a run.

    Attributes:
        pool: rendered scenes.
        easy: easy-VQA; None where it is left out.
        validation: pools that training never sees, tokenized.
    """

    pool: Pool
    easy: Pool | None
    validation: Sequence[tuple[Pool, TokenizedQuestions]]

    @property
    def pools(self) -> list[Pool]:
        """The scenes and, where there is one, easy-VQA."""
        return [self.pool] + ([self.easy] if self.easy else [])

    def shares(self, batch: int, easy_vqa_share: float) -> list[int]:
        """How many pictures of each pool make a batch."""
        num_easy = round(easy_vqa_share * batch) if self.easy else 0
        return [batch - num_easy, num_easy][: len(self.pools)]


@dataclass(frozen=True)
class Networks:
    """What is trained.

    Attributes:
        model: the LVLM.
        patch_heads, phrase_heads: its teachers, which are thrown away afterwards.
    """

    model: LlavaForConditionalGeneration
    patch_heads: PatchHeads
    phrase_heads: PhraseHeads


@dataclass(frozen=True)
class Run:
    """How a stage runs.

    Attributes:
        settings: see there.
        work: folder of the states.
        workers: threads that share a batch.
        resume: go on from the state in the folder, where there is one.
    """

    settings: Settings
    work: Path
    workers: Workers
    resume: bool


@dataclass
class Batch:
    """The pictures of one step.

    Attributes:
        chosen: (pool, picture) of each.
        images: (B, 3, 96, 96) fp32.
        asked: the questions about each, as indices of its pool's table; none in the first stage.
        figures: what each part of the batch reports.
    """

    chosen: list[tuple[int, int]]
    images: torch.Tensor
    asked: list[np.ndarray] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)


class Stage(ABC):
    """Steps until their number or a stop, with the state in the work folder.

    Args:
        title: for the progress bar.
        run: settings, folder and threads.
        steps: how many; a number in the file ``steps_file`` of the folder replaces it, also while the stage runs.
        smoothing: share of a figure's moving average that a step leaves.

    Attributes:
        step: steps that were made, those before a resumption included.
        seconds: processor time of the steps. It does not count while a run is halted.
    """

    def __init__(self, title: str, run: Run, steps: int, steps_file: str, smoothing: float) -> None:
        self.settings, self.workers = run.settings, run.workers
        self.step, self.seconds = 0, 0.0
        self._title, self._steps, self._steps_file = title, steps, run.work / steps_file
        self._smoothed = Smoothed(smoothing)

    def run(self, stop: Stop) -> None:
        """Make the steps that are left, and save the state."""
        with tqdm(total=self._total(), initial=self.step, desc=self._title, mininterval=5) as bar:
            while self.step < (total := self._total()) and not stop.asked:
                began = time.process_time()
                for figures in self._advance(warm_up_then_fall(self.step, total, self.settings.decay_share)):
                    self._smoothed.add(figures)
                self.step += 1
                self.seconds += time.process_time() - began
                bar.total = total
                bar.set_postfix(loss=f"{self._smoothed.values['loss']:.3f}", refresh=False)
                bar.update()
                if self.step % 50 == 0:
                    bar.write(f"{self._title} {self.step}: {self._smoothed.line()}")
                self._keep(bar.write)
        self.save()

    def _total(self) -> int:
        try:
            return int(self._steps_file.read_text())
        except (OSError, ValueError):
            return self._steps

    @abstractmethod
    def _advance(self, rate: float) -> list[dict[str, float]]:
        """Make one step at ``rate`` times the peak rates; the figures of its parts."""

    @abstractmethod
    def _keep(self, say: Callable[[str], None]) -> None:
        """Save the state, where it is time."""

    @abstractmethod
    def save(self) -> None:
        """Write the state."""


class VisionStage(Stage):
    """Stage one: the vision tower and the patch heads on the patch labels alone, in place."""

    def __init__(self, networks: Networks, data: TrainingData, run: Run) -> None:
        super().__init__("vision", run, run.settings.vision_steps, "vision_steps", 0.95)
        self._tower, self._heads, self._data = networks.model.model.vision_tower, networks.patch_heads, data
        rate = run.settings.vision_rate
        self._optimizers = Optimizers([(self._tower, 1.0), (self._heads, 1.0)], rate, rate, run.workers)
        parts = {"tower": self._tower, "heads": self._heads, "optimizers": self._optimizers}
        self._checkpoint = Checkpoint(run.work / "vision.pt", parts)
        if run.resume and (saved := self._checkpoint.load()):
            self.step = saved["step"]
        self._rng = np.random.default_rng([run.settings.seed, 11, self.step])
        self._rows = [shuffled(len(pool), self._rng) for pool in data.pools]

    def _advance(self, rate: float) -> list[dict[str, float]]:
        counts = self._data.shares(self.settings.vision_batch, self.settings.easy_vqa_share)
        chosen = [
            np.array([next(rows) for _ in range(n)], np.int64) for rows, n in zip(self._rows, counts, strict=True)
        ]
        pools = self._data.pools
        images = np.concatenate([pool.images[rows] for pool, rows in zip(pools, chosen, strict=True)])
        batch = Batch([], normalize(images, self._rng))
        targets = [patch_targets(pool, rows) for pool, rows in zip(pools, chosen, strict=True)]
        labels, offsets, centers = (torch.cat(column) for column in zip(*targets, strict=True))
        dealt = deal(range(len(images)), self.settings.parts)
        losses = self.workers.backward(
            [partial(self._loss, batch, labels, offsets, centers, part) for part in dealt], self._optimizers.parameters
        )
        self._optimizers.step(rate)
        return [{"loss": sum(losses), **batch.figures[0]}]

    def _loss(
        self, batch: Batch, labels: torch.Tensor, offsets: torch.Tensor, centers: torch.Tensor, part: list[int]
    ) -> torch.Tensor:
        with _mixed_precision():
            states = self._tower(pixel_values=batch.images[part]).last_hidden_state[:, 1:]
        loss, accuracy = patch_loss(self._heads, states, labels[part], offsets[part], centers[part])
        batch.figures.append(accuracy)
        return loss * (len(part) / len(batch.images))

    def _keep(self, say: Callable[[str], None]) -> None:
        if self.step % 200 == 0:
            self.save()

    def save(self) -> None:
        """Write the state."""
        self._checkpoint.save({"step": self.step})


class AnswerStage(Stage):
    """Stage two: the whole model on the answers.

    Attributes:
        history: step, seconds and accuracy by kind of every validation.
    """

    def __init__(self, networks: Networks, data: TrainingData, run: Run) -> None:
        settings = run.settings
        super().__init__("answers", run, settings.steps, "steps", 0.995)
        self._model, self._heads, self._phrase_heads = networks.model, networks.patch_heads, networks.phrase_heads
        self._data = data
        self._history_file = run.work / "history.json"
        self._rng = np.random.default_rng([settings.seed, 12])
        self._tables = [tokenize(pool) for pool in data.pools]
        self._optimizers = Optimizers(self._modules(), settings.matrix_rate, settings.rate, run.workers)
        self._average = Average(self._model)
        self._kind_weights = np.ones(len(KINDS))
        self.history: list[dict[str, Any]] = []
        self._checkpoint = Checkpoint(
            run.work / "state.pt",
            {
                "model": self._model,
                "heads": self._heads,
                "phrase_heads": self._phrase_heads,
                "optimizers": self._optimizers,
                "average": self._average,
                "rng": Generator(self._rng),
            },
        )
        if run.resume and (saved := self._checkpoint.load()):
            self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
            self._kind_weights[:] = saved["kind_weights"]
        self._rows = [shuffled(len(pool), self._rng) for pool in data.pools]
        self._scratch = build_model(settings.seed)

    def _modules(self) -> list[tuple[nn.Module, float]]:
        parts = self._model.model
        return [
            (parts.vision_tower, 0.2),
            (parts.multi_modal_projector, 1.0),
            (parts.language_model, 1.0),
            (self._model.lm_head, 1.0),
            (self._heads, 0.2),
            (self._phrase_heads, 1.0),
        ]

    def run(self, stop: Stop) -> None:
        """Make the steps that are left, save the state, and leave the averaged weights in the model."""
        self._model.train()
        super().run(stop)
        self._model.load_state_dict(self._average.weights)

    def _advance(self, rate: float) -> list[dict[str, float]]:
        counts = self._data.shares(self.settings.batch, self.settings.easy_vqa_share)
        pools, tables, weights = self._data.pools, self._tables, self._kind_weights
        chosen = [(k, next(self._rows[k])) for k in range(len(pools)) for _ in range(counts[k])]
        asked = [choose_questions(tables[k], row, self.settings.questions, weights, self._rng) for k, row in chosen]
        images = normalize(np.stack([pools[k].images[row] for k, row in chosen]), self._rng)
        batch = Batch(chosen, images, asked)
        dealt = deal(range(len(chosen)), self.settings.parts)
        self.workers.backward([partial(self._loss, batch, part) for part in dealt], self._optimizers.parameters)
        self._optimizers.step(rate)
        self._average.update(self._model)
        return batch.figures

    def _loss(self, batch: Batch, part: list[int]) -> torch.Tensor:
        chosen = [batch.chosen[i] for i in part]
        asked = [batch.asked[i] for i in part]
        packed = pack([(self._tables[k], own) for (k, _), own in zip(chosen, asked, strict=True)])
        targets = [patch_targets(self._data.pools[k], np.array([row])) for k, row in chosen]
        with _mixed_precision():
            logits, states, half = answer_logits(self._model, batch.images[part], packed)
        losses = nn.functional.cross_entropy(logits.float(), packed.targets, reduction="none")
        # A kind that the last validation found hard counts for more, beyond being asked more often.
        kind_weights = torch.from_numpy(self._kind_weights).float()
        weight = packed.weight * kind_weights[packed.kinds[packed.owner]]
        answers = (losses * weight).sum() / weight.sum()
        patches, _ = patch_loss(self._heads, states, *(torch.cat(column) for column in zip(*targets, strict=True)))
        loss = answers + self.settings.auxiliary_weight * patches
        seen = {"loss": float(answers.detach()), "patch": float(patches.detach())}
        # The objects of a picture are known for generated scenes only.
        spoken_of = phrase_targets(
            packed,
            [
                (self._data.pool, row, self._tables[0], own) if k == 0 else None
                for (k, row), own in zip(chosen, asked, strict=True)
            ],
        )
        if spoken_of is not None:
            phrase, figures = phrase_loss(self._phrase_heads, half, spoken_of)
            loss = loss + self.settings.phrase_weight * phrase
            seen |= figures
        batch.figures.append(seen)
        return loss * (len(part) / len(batch.chosen))

    def _keep(self, say: Callable[[str], None]) -> None:
        if self.step % self.settings.validate_every == 0:
            say(f"validation at {self.step}: {show(self._validate())}")
            self.save()

    def _validate(self) -> dict[str, tuple[int, int]]:
        """Measure the averaged weights, and weigh each kind by its share of wrong answers from here on."""
        self._scratch.load_state_dict(self._average.weights)
        self._scratch.eval()
        accuracy: dict[str, tuple[int, int]] = {}
        for pool, table in self._data.validation:
            accuracy |= packed_accuracy(self._scratch, pool, table)
        for index, kind in enumerate(KINDS):
            right, asked = accuracy.get(kind, (0, 0))
            self._kind_weights[index] = 0.15 + (1 - right / asked if asked else 1.0)
        self.history.append({"step": self.step, "seconds": round(self.seconds), "accuracy": accuracy})
        write_whole(self._history_file, json.dumps(self.history).encode())
        return accuracy

    def save(self) -> None:
        """Write the state."""
        self._checkpoint.save(
            {
                "step": self.step,
                "seconds": self.seconds,
                "history": self.history,
                "kind_weights": self._kind_weights.tolist(),
            }
        )


def shuffled(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Give 0 … count − 1 in random order, again and again."""
    while True:
        yield from rng.permutation(count)


def choose_questions(
    table: TokenizedQuestions, row: int, count: int, kind_weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw ``count`` questions of a picture (all where it has fewer) by the weight of their kind."""
    candidates = np.arange(table.first[row], table.first[row + 1])
    if len(candidates) <= count:
        return candidates
    # The largest count of log-weight + Gumbel noise is a weighted draw without replacement.
    keys = np.log(kind_weights[table.kind[candidates]]) + rng.gumbel(size=len(candidates))
    return candidates[np.argpartition(-keys, count)[:count]]


def _mixed_precision() -> torch.autocast:
    """bf16 matrix products: a quarter less processor time per step on a chip with bf16 units; losses stay in fp32."""
    return torch.autocast("cpu", torch.bfloat16)
