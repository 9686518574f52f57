"""The training: projector and adapters on packed questions, stoppable at any time."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch.nn import functional
from tqdm import tqdm

from ..common import machine
from ..models.smollm2 import load_smollm2
from .backbone import load_backbone
from .decoder import AdaptedDecoder
from .model import Projector, assemble
from .packing import pack
from .pictures import descriptions, load_pictures, make_pictures
from .questions import Blocks, choose, choose_patches, question_errors
from .words import PatchWords, align

RANK = 16
PICTURES, QUESTIONS = 2, 14
# Most patches are background: in the first part of the training a picture hands over these only, objects' first.
FEW_PATCHES, FEW_SHARE = 80, 0.75
ADAPTER_RATE, PROJECTOR_RATE, WARM_UP = 1e-3, 3e-4, 20
CHECKPOINT_SECONDS = 180


class Training:
    """Projector and adapters, their optimiser, and how far they are.

    Args:
        folder: of the pictures, the checkpoint and the finished model.
    """

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.language_model, self.tokenizer = load_smollm2()
        self.language_model.requires_grad_(False)
        make_pictures(folder / "pictures")
        self.pictures = load_pictures(folder / "pictures")
        for row, (labels, asked) in enumerate(zip(self.pictures.labels, self.pictures.questions, strict=True)):
            asked += descriptions(labels, numpy.random.default_rng([4, row]))
        self.decoder = AdaptedDecoder(self.language_model.model, self.language_model.lm_head.weight, RANK)
        width = self.language_model.config.hidden_size
        self.projector = Projector(self.pictures.features.shape[-1], width)
        groups = [(self.projector, PROJECTOR_RATE), (self.decoder, ADAPTER_RATE)]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(each.parameters()), "lr": rate, "peak": rate} for each, rate in groups],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        self.blocks = Blocks(self.tokenizer)
        self.step, self.seconds, self.explained = 0, 0.0, 0.0

    @property
    def _state(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write the checkpoint."""
        state = {name: getattr(self, name) for name in ("step", "seconds", "explained")}
        state |= {name: getattr(self, name).state_dict() for name in ("projector", "decoder", "optimizer")}
        torch.save(state, self._state.with_suffix(".tmp"))
        self._state.with_suffix(".tmp").replace(self._state)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; whether there is one."""
        if not self._state.is_file():
            return False
        state = torch.load(self._state, weights_only=False)
        for name in ("projector", "decoder", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds, self.explained = state["step"], state["seconds"], state["explained"]
        return True

    def batches(self) -> Iterator[list[int]]:
        """Number the pictures of each step from the present one on, each epoch in an order of its own."""
        per_epoch = len(self.pictures) // PICTURES
        while True:
            epoch, start = divmod(self.step, per_epoch)
            order = numpy.random.default_rng([2, epoch]).permutation(len(self.pictures))
            for number in range(start, per_epoch):
                yield order[number * PICTURES : (number + 1) * PICTURES].tolist()

    def one_step(self, rows: list[int], few: bool, rate: float) -> tuple[float, list[tuple[str, bool]]]:
        """Make one update; returns the loss, and of each question its kind and whether it was answered right."""
        rng = numpy.random.default_rng([3, self.step])
        total = self.pictures.features.shape[1]
        kept = numpy.stack(
            [choose_patches(self.pictures.labels[row], FEW_PATCHES if few else total, rng) for row in rows]
        )
        features = numpy.stack([self.pictures.features[row][own] for row, own in zip(rows, kept, strict=True)])
        asked = [choose(self.pictures.questions[row], QUESTIONS, rng) for row in rows]
        blocks = [[self.blocks.block(question) for question in each] for each in asked]
        packed = pack(self.blocks.before, total, torch.from_numpy(kept), blocks)
        image_tokens = self.projector(torch.from_numpy(features.astype(numpy.float32)).flatten(0, 1))
        logits = self.decoder(image_tokens, packed).float()
        # A long answer counts more than a short one, but less than by its length.
        weight = packed.question.bincount()[packed.question].float().rsqrt()
        loss = (functional.cross_entropy(logits, packed.targets, reduction="none") * weight).sum() / weight.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.optimizer.step()
        self.step += 1
        errors = question_errors(logits, packed.targets, packed.question).tolist()
        kinds = [question.kind for each in asked for question in each]
        return loss.item(), [(kind, error == 0) for kind, error in zip(kinds, errors, strict=True)]

    def run(self, seconds: float) -> None:
        """Train until ``seconds`` have been spent in all."""
        from lvlm_fastxai.training.stopping import Stop

        right: dict[str, float] = {}
        mean, saved = 0.0, time.monotonic()
        bar = tqdm(total=round(seconds), initial=round(self.seconds), desc="questions", unit="s", mininterval=10)
        with Stop() as stop, bar:
            for rows in self.batches():
                if stop.asked or self.seconds >= seconds:
                    break
                started, done = time.monotonic(), self.seconds / seconds
                rate = min(1.0, (self.step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
                loss, answers = self.one_step(rows, done < FEW_SHARE, rate)
                mean = loss if not mean else mean + 0.05 * (loss - mean)
                for kind, good in answers:
                    right[kind] = right.get(kind, 0.0) + 0.03 * (good - right.get(kind, 0.0))
                self.seconds += time.monotonic() - started
                bar.update(round(self.seconds) - bar.n)
                bar.set_postfix(step=self.step, loss=f"{mean:.3f}", refresh=False)
                if self.step % 20 == 0:
                    self.log(mean, right)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def log(self, loss: float, right: dict[str, float]) -> None:
        """Add a line to the history: the mean loss, and of each kind the share of right answers."""
        line = {"step": self.step, "seconds": round(self.seconds), "loss": round(loss, 4)}
        with (self.folder / "history.jsonl").open("a") as log:
            log.write(json.dumps({**line, **{k: round(v, 3) for k, v in sorted(right.items())}}) + "\n")

    def finish(self) -> None:
        """Write the model, and what its training took."""
        self.decoder.merge_into(self.language_model.model)
        model, processor = assemble(load_backbone(), self.projector, self.language_model, self.tokenizer)
        model.save_pretrained(self.folder / "model")
        processor.save_pretrained(self.folder / "model")
        spent = {
            "features_seconds": round(self.pictures.seconds),
            "questions_seconds": round(self.seconds),
            "steps": self.step,
            "pictures": len(self.pictures),
            "words_explained": round(self.explained, 3),
            "machine": machine.describe(),
        }
        (self.folder / "model" / "training.json").write_text(json.dumps(spent, indent=1) + "\n")


def train(args: argparse.Namespace) -> int:
    """Train the model, or go on with it, and write it."""
    torch.set_num_threads(args.threads)
    training = Training(args.folder)
    if not training.resume():
        started = time.monotonic()
        embeddings = training.language_model.get_input_embeddings().weight.detach()
        words = PatchWords(training.tokenizer, embeddings)
        training.explained = align(training.projector, training.pictures, words)
        training.seconds = time.monotonic() - started
        training.save()
    training.run(60 * args.minutes - training.pictures.seconds)
    training.finish()
    return 0
