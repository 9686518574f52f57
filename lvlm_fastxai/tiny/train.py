"""Train the shipped LVLM from a seed: ``python -m lvlm_fastxai.tiny.train``.

Two stages. First the vision tower alone learns to say, for every patch, what lies under it (heads thrown away
afterwards). Then the whole model learns to answer, and half-way up the decoder to say what each noun phrase of a
question speaks of (:mod:`lvlm_fastxai.tiny.phrases`). Many questions about one picture share a sequence: each block of
question and answer sees the picture's tokens and itself, at the positions it would have alone, so the numbers are those
of one question at a time while the picture is paid once (:mod:`lvlm_fastxai.tiny.packing`).

The folder of ``--work`` holds the rendered scenes, the state to ``--resume`` from and the log of validations. SIGTERM
saves the state and the model and ends the run; a number in the files ``vision_steps`` and ``steps`` of that folder
moves the end of a stage while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

# Spinning OpenMP threads slow each other down where cores are shared; torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from lvlm_fastxai.tiny import WEIGHTS, load_tiny_lvlm, scenes
from lvlm_fastxai.tiny.accuracy import evaluate, held_out_pool, packed_accuracy, prior, show
from lvlm_fastxai.tiny.data import (
    GRID,
    IGNORE,
    KINDS,
    LABEL_NAMES,
    LABEL_VALUES,
    SCENES_PER_SEED,
    Pool,
    add_questions,
    easy_vqa,
    easy_vqa_pool,
    load_pool,
    render_pool,
)
from lvlm_fastxai.tiny.model import build_model, save_checkpoint
from lvlm_fastxai.tiny.packing import TokenizedQuestions, answer_logits, normalize, pack, tokenize
from lvlm_fastxai.tiny.phrases import PhraseHeads, phrase_loss, phrase_targets

SUBSET = 200
"""Held-out questions of the small evaluation that ``training.json`` records beside the large one."""

_EASY_VQA_VALIDATION = 200


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """What a run is made of; ``--help`` prints the meaning of each."""

    seed: int = _setting(0, "draws the scenes, the first weights and the order of everything")
    scenes: int = _setting(60_000, "training scenes to render")
    vision_steps: int = _setting(700, "steps of the first stage, in which the vision tower learns patch labels")
    steps: int = _setting(8_000, "steps of the second stage, in which the whole model learns to answer")
    vision_batch: int = _setting(48, "pictures per step of the first stage")
    batch: int = _setting(12, "pictures per step of the second stage")
    parts: int = _setting(4, "pieces a batch is cut into for the threads")
    questions: int = _setting(12, "questions per picture and step, at most")
    easy_vqa_share: float = _setting(0.25, "share of easy-VQA pictures in a batch")
    vision_rate: float = _setting(2e-3, "peak learning rate of the first stage")
    matrix_rate: float = _setting(4e-3, "peak learning rate of the second stage's matrices (Muon)")
    rate: float = _setting(1.5e-3, "peak learning rate of everything else in the second stage (AdamW)")
    auxiliary_weight: float = _setting(0.5, "weight of the patch labels in the second stage")
    phrase_weight: float = _setting(0.5, "weight of the phrase read-outs in the second stage")
    comparisons: int = _setting(6, "comparison questions to ask of each picture beyond those of the rendered scenes")
    decay_share: float = _setting(0.35, "share of a stage in which the learning rate falls to zero")
    validate_every: int = _setting(200, "steps between validations and checkpoints")
    validation_scenes: int = _setting(240, "scenes of a validation")


# What lies under each patch


class PatchHeads(nn.Module):
    """Linear read-outs of a patch state: presence, attributes, the object's centre. Not part of the shipped model.

    The centre is asked for twice, from the patch and from the middle of the picture: without the second the tower has
    no reason to keep where a patch is, and questions about places and sides are learnt late.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(LABEL_VALUES[name]) for name in LABEL_NAMES]
        self.linear = nn.Linear(width, sum(self.sizes) + 5)

    def forward(self, states: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Logits per label name, and (B, patches, 5): centre logit, then the object's centre as seen from the patch and
        from the middle of the picture, x and y in units of 32 canvas pixels."""
        out = self.linear(states.float())
        return list(out[..., :-5].split(self.sizes, dim=-1)), out[..., -5:]


def patch_loss(
    heads: PatchHeads, states: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor, centers: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of the patch read-outs, and the share of labelled patches that each gets right.

    Args:
        states: (B, P, width).
        labels: (B, P, 5) int64; offsets: (B, P, 2) fp32, canvas pixels; centers: (B, P) fp32.
    """
    logits, geometry = heads(states)
    loss = states.new_zeros((), dtype=torch.float32)
    accuracy = {}
    for index, name in enumerate(LABEL_NAMES):
        known = labels[..., index] != IGNORE
        if known.any():
            scores, truth = logits[index][known], labels[..., index][known]
            loss = loss + nn.functional.cross_entropy(scores, truth)
            accuracy[name] = float((scores.argmax(-1) == truth).float().mean())
    owned = labels[..., 0] == 1
    side = scenes.CANVAS / GRID
    middle = (torch.arange(GRID) + 0.5) * side - scenes.CANVAS / 2
    patches = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).flatten(0, 1)  # (P, 2), x then y
    places = torch.cat([offsets, offsets + patches], -1) / 32.0
    loss = loss + 2 * nn.functional.smooth_l1_loss(geometry[..., 1:][owned], places[owned])
    hit = nn.functional.binary_cross_entropy_with_logits(geometry[..., 0], centers, pos_weight=torch.tensor(5.0))
    return loss + hit, accuracy


# Batches


def patch_targets(pool: Pool, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, offsets and centres of ``rows`` with the grid flattened, as :func:`patch_loss` takes them."""
    return (
        torch.from_numpy(pool.labels[rows].astype(np.int64)).flatten(1, 2),
        torch.from_numpy(pool.offsets[rows].astype(np.float32)).flatten(1, 2),
        torch.from_numpy(pool.centers[rows].astype(np.float32)).flatten(1, 2),
    )


def shuffled_rows(count: int, rng: np.random.Generator) -> Iterator[int]:
    """0 … count − 1 in random order, again and again."""
    while True:
        yield from rng.permutation(count)


def choose_questions(
    table: TokenizedQuestions, row: int, count: int, kind_weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """``count`` questions of a picture (all where it has fewer), drawn by the weight of their kind."""
    candidates = np.arange(table.first[row], table.first[row + 1])
    if len(candidates) <= count:
        return candidates
    # The largest count of log-weight + Gumbel noise is a weighted draw without replacement.
    keys = np.log(kind_weights[table.kind[candidates]]) + rng.gumbel(size=len(candidates))
    return candidates[np.argpartition(-keys, count)[:count]]


# Optimisation


def rate_factor(step: int, total: int, decay_share: float, warmup: int = 100) -> float:
    """Warm-up, a constant stretch, and a linear fall to zero over the last ``decay_share`` of ``total`` steps."""
    left = (total - step) / max(1.0, decay_share * total)
    return min(1.0, (step + 1) / warmup, max(0.0, left))


class Workers:
    """Threads that compute with one core each.

    A batch is cut into small parts that whichever thread is free takes next. On a machine whose cores are shared this
    keeps every one of them busy, where two OpenMP threads inside one product would wait for the slower; and with
    matrices this small one core per part needs a third less processor time.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, losses: Sequence[Callable[[], torch.Tensor]], parameters: Sequence[nn.Parameter]) -> list[float]:
        """Set ``parameters``' gradients to those of the sum of ``losses``, added in their order; returns the values."""

        def part(loss: Callable[[], torch.Tensor]) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            value = loss()
            return float(value.detach()), torch.autograd.grad(value, parameters, allow_unused=True)

        results = list(self.pool.map(part, losses))
        for index, parameter in enumerate(parameters):
            parts = [g for _, gradients in results if (g := gradients[index]) is not None]
            parameter.grad = torch.stack(parts).sum(0) if parts else None
        return [value for value, _ in results]


def _deal(rows: Sequence, parts: int) -> list[list]:
    """``rows`` dealt like cards into at most ``parts`` lists, so that each holds a bit of everything."""
    return [list(rows[start::parts]) for start in range(parts) if len(rows) > start]


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for everything else (embeddings, norms, biases, heads).

    Args:
        modules: each with a factor for its rates.
        matrix_rate: Muon's peak rate, in AdamW's scale (an update's root mean square per unit of rate).
        rate: AdamW's peak rate.
    """

    def __init__(
        self, modules: Sequence[tuple[nn.Module, float]], matrix_rate: float, rate: float, workers: Workers
    ) -> None:
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for module, factor in modules:
            for name, parameter in module.named_parameters():
                hidden = parameter.ndim == 2 and ".layers." in f".{name}"
                # Where a patch is matters only to the second stage: these may move faster than the rest of the tower.
                own = max(factor, 0.5) if "position_embedding" in name else factor
                group = {"params": [parameter], "lr": own * (matrix_rate if hidden else rate)}
                (matrices if hidden else others).append(group)
        self.workers = workers
        self.parameters = [p for group in matrices + others for p in group["params"]]
        self.each: list[torch.optim.Optimizer] = [
            torch.optim.Muon(part, lr=matrix_rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            for part in _deal(matrices, 2)
        ]
        self.each.append(torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)))
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.each]

    def step(self, factor: float) -> None:
        """One clipped update at ``factor`` times the peak rates; gradients are cleared."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peaks in zip(self.each, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        list(self.workers.pool.map(lambda optimizer: optimizer.step(), self.each))
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.each]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)


class Average:
    """Exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)


# The two stages


class Stop:
    """Inside its ``with`` block, SIGTERM and an interrupt set ``asked`` instead of ending the process."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _save(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train_vision(
    model: LlavaForConditionalGeneration,
    heads: PatchHeads,
    pool: Pool,
    easy: Pool | None,
    settings: Settings,
    work: Path,
    stop: Stop,
    workers: Workers,
    *,
    resume: bool,
) -> None:
    """Stage one: the vision tower and the patch heads on the patch labels alone, in place."""
    tower = model.model.vision_tower
    num_easy = round(settings.easy_vqa_share * settings.vision_batch) if easy else 0
    optimizers = Optimizers([(tower, 1.0), (heads, 1.0)], settings.vision_rate, settings.vision_rate, workers)
    step = 0
    state_file = work / "vision.pt"
    if resume and state_file.is_file():
        state = torch.load(state_file, weights_only=False)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimizers.load_state_dict(state["optimizers"])
        step = state["step"]
    rng = np.random.default_rng([settings.seed, 11, step])
    rows, easy_rows = shuffled_rows(len(pool), rng), shuffled_rows(len(easy) if easy else 1, rng)
    total = _total_steps(work / "vision_steps", settings.vision_steps)
    bar = tqdm(total=total, initial=step, desc="vision tower", mininterval=5)
    running: dict[str, float] = {}
    while step < total and not stop.asked:
        parts = [(pool, [next(rows) for _ in range(settings.vision_batch - num_easy)])]
        if easy:
            parts.append((easy, [next(easy_rows) for _ in range(num_easy)]))
        images = normalize(np.concatenate([p.images[np.array(chosen)] for p, chosen in parts]), rng)
        targets = [patch_targets(p, np.array(chosen)) for p, chosen in parts]
        labels, offsets, centers = (torch.cat(column) for column in zip(*targets, strict=True))
        accuracies: list[dict[str, float]] = []

        def part_loss(
            part: list[int],
            images: torch.Tensor = images,
            labels: torch.Tensor = labels,
            offsets: torch.Tensor = offsets,
            centers: torch.Tensor = centers,
            accuracies: list[dict[str, float]] = accuracies,
        ) -> torch.Tensor:
            with _mixed_precision():
                states = tower(pixel_values=images[part]).last_hidden_state[:, 1:]
            loss, accuracy = patch_loss(heads, states, labels[part], offsets[part], centers[part])
            accuracies.append(accuracy)
            return loss * (len(part) / len(images))

        parts_of_rows = _deal(range(len(images)), settings.parts)
        losses = workers.backward([partial(part_loss, part) for part in parts_of_rows], optimizers.parameters)
        total = _total_steps(work / "vision_steps", settings.vision_steps)
        optimizers.step(rate_factor(step, total, settings.decay_share))
        step += 1
        for name, value in {"loss": sum(losses), **accuracies[0]}.items():
            running[name] = 0.95 * running.get(name, value) + 0.05 * value
        bar.total = total
        bar.update()
        if step % 50 == 0:
            bar.write(f"vision {step}: " + " ".join(f"{k} {v:.3f}" for k, v in running.items()))
        if step % 200 == 0 or step >= total or stop.asked:
            weights = {"tower": tower.state_dict(), "heads": heads.state_dict()}
            _save(state_file, {**weights, "optimizers": optimizers.state_dict(), "step": step})
    bar.close()


def _mixed_precision() -> torch.autocast:
    """bf16 matrix products: a quarter less processor time per step on a chip with bf16 units; losses stay in fp32."""
    return torch.autocast("cpu", torch.bfloat16)


def _total_steps(file: Path, default: int) -> int:
    """The number in ``file``, through which the end of a running stage can be moved; ``default`` without one."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return default


def train_answers(
    model: LlavaForConditionalGeneration,
    heads: PatchHeads,
    phrase_heads: PhraseHeads,
    pool: Pool,
    easy: Pool | None,
    validation: Sequence[tuple[Pool, TokenizedQuestions]],
    settings: Settings,
    work: Path,
    stop: Stop,
    workers: Workers,
    *,
    resume: bool,
) -> dict:
    """Stage two: the whole model on the answers. Leaves the averaged weights in ``model``; returns the record."""
    rng = np.random.default_rng([settings.seed, 12])
    tables = [tokenize(pool)] + ([tokenize(easy)] if easy else [])
    pools = [pool] + ([easy] if easy else [])
    num_easy = round(settings.easy_vqa_share * settings.batch) if easy else 0
    counts = [settings.batch - num_easy, num_easy][: len(pools)]
    optimizers = Optimizers(
        [
            (model.model.vision_tower, 0.2),
            (model.model.multi_modal_projector, 1.0),
            (model.model.language_model, 1.0),
            (model.lm_head, 1.0),
            (heads, 0.2),
            (phrase_heads, 1.0),
        ],
        settings.matrix_rate,
        settings.rate,
        workers,
    )
    average = Average(model)
    kind_weights = np.ones(len(KINDS))
    step, seconds, history = 0, 0.0, []
    state_file = work / "state.pt"
    if resume and state_file.is_file():
        state = torch.load(state_file, weights_only=False)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        phrase_heads.load_state_dict(state["phrase_heads"])
        optimizers.load_state_dict(state["optimizers"])
        average.weights, average.updates = state["average"], state["updates"]
        kind_weights, step, seconds, history = state["kind_weights"], state["step"], state["seconds"], state["history"]
        rng.bit_generator.state = state["rng"]
    rows = [shuffled_rows(len(p), rng) for p in pools]
    scratch = build_model(settings.seed)

    def checkpoint() -> None:
        state = {
            "model": model.state_dict(),
            "heads": heads.state_dict(),
            "phrase_heads": phrase_heads.state_dict(),
            "optimizers": optimizers.state_dict(),
            "average": average.weights,
            "updates": average.updates,
            "kind_weights": kind_weights,
            "step": step,
            "seconds": seconds,
            "history": history,
            "rng": rng.bit_generator.state,
        }
        _save(state_file, state)

    def validate() -> None:
        scratch.load_state_dict(average.weights)
        scratch.eval()
        accuracy: dict[str, tuple[int, int]] = {}
        for held_pool, table in validation:
            accuracy |= packed_accuracy(scratch, held_pool, table)
        for index, kind in enumerate(KINDS):
            right, asked = accuracy.get(kind, (0, 0))
            kind_weights[index] = 0.15 + (1 - right / asked if asked else 1.0)
        history.append({"step": step, "seconds": round(seconds), "accuracy": accuracy})
        (work / "history.json").write_text(json.dumps(history))
        bar.write(f"validation at {step}: {show(accuracy)}")

    bar = tqdm(total=_total_steps(work / "steps", settings.steps), initial=step, desc="answers", mininterval=5)
    running: dict[str, float] = {}
    model.train()
    while step < _total_steps(work / "steps", settings.steps) and not stop.asked:
        # Processor time, so that a run that is halted for a while reports the time it used.
        began = time.process_time()
        chosen = [(k, next(rows[k])) for k in range(len(pools)) for _ in range(counts[k])]
        asked = [choose_questions(tables[k], r, settings.questions, kind_weights, rng) for k, r in chosen]
        images = normalize(np.stack([pools[k].images[r] for k, r in chosen]), rng)
        values: list[dict[str, float]] = []

        def part_loss(
            part: list[int],
            chosen: list[tuple[int, int]] = chosen,
            asked: list[np.ndarray] = asked,
            images: torch.Tensor = images,
            values: list[dict[str, float]] = values,
        ) -> torch.Tensor:
            packed = pack([(tables[chosen[i][0]], asked[i]) for i in part])
            targets = [patch_targets(pools[k], np.array([r])) for k, r in (chosen[i] for i in part)]
            with _mixed_precision():
                logits, states, half = answer_logits(model, images[part], packed)
            losses = nn.functional.cross_entropy(logits.float(), packed.targets, reduction="none")
            # A kind that the last validation found hard counts for more, beyond being asked more often.
            weight = packed.weight * torch.from_numpy(kind_weights).float()[packed.kinds[packed.owner]]
            answers = (losses * weight).sum() / weight.sum()
            patches, _ = patch_loss(heads, states, *(torch.cat(column) for column in zip(*targets, strict=True)))
            loss = answers + settings.auxiliary_weight * patches
            seen = {"loss": float(answers.detach()), "patch": float(patches.detach())}
            spoken_of = phrase_targets(
                packed, [(pool, chosen[i][1], tables[0], asked[i]) if chosen[i][0] == 0 else None for i in part]
            )
            if spoken_of is not None:
                phrase, figures = phrase_loss(phrase_heads, half, spoken_of)
                loss = loss + settings.phrase_weight * phrase
                seen |= figures
            values.append(seen)
            return loss * (len(part) / len(chosen))

        parts_of_rows = _deal(range(len(chosen)), settings.parts)
        workers.backward([partial(part_loss, part) for part in parts_of_rows], optimizers.parameters)
        total = _total_steps(work / "steps", settings.steps)
        optimizers.step(rate_factor(step, total, settings.decay_share))
        average.update(model)
        step += 1
        seconds += time.process_time() - began
        for seen in values:
            for name, value in seen.items():
                running[name] = 0.995 * running.get(name, value) + 0.005 * value
        bar.total = total
        bar.set_postfix({name: f"{running[name]:.3f}" for name in ("loss", "patch")}, refresh=False)
        bar.update()
        if step % 50 == 0:
            bar.write(f"answers {step}: " + " ".join(f"{k} {v:.3f}" for k, v in running.items()))
        if step % settings.validate_every == 0:
            validate()
            checkpoint()
    bar.close()
    checkpoint()
    model.load_state_dict(average.weights)
    return {"steps": step, "processor_seconds": round(seconds), "validation": history}


def _validation_pools(
    work: Path, num_scenes: int, easy: Pool | None, threads: int
) -> list[tuple[Pool, TokenizedQuestions]]:
    folder, seed = work / "validation", scenes.VALIDATION_SEEDS.start // SCENES_PER_SEED
    render_pool(folder, num_scenes=num_scenes, seed=seed, workers=threads, shard_size=num_scenes)
    pools = [load_pool(folder)] + ([easy] if easy else [])
    return [(pool, tokenize(pool)) for pool in pools]


def _part(pool: Pool, rows: slice) -> Pool:
    return Pool(pool.images[rows], pool.labels[rows], pool.offsets[rows], pool.centers[rows], pool.questions[rows])


def train(settings: Settings, work: Path, output: Path, *, threads: int, resume: bool, use_easy_vqa: bool) -> bool:
    """The whole recipe; writes the checkpoint and ``training.json`` to ``output``.

    Returns False, and writes nothing there, where SIGTERM came before the second stage.
    """
    work.mkdir(parents=True, exist_ok=True)
    workers = Workers(threads)
    render_pool(work / "pool", num_scenes=settings.scenes, seed=settings.seed, workers=threads)
    pool = load_pool(work / "pool")
    more = work / f"comparisons-{settings.comparisons}.json"
    add_questions(pool, "comparison", settings.comparisons, seed=settings.seed, workers=threads, cache=more)
    easy = easy_vqa_pool("train") if use_easy_vqa else None
    held_easy = _part(easy, slice(-_EASY_VQA_VALIDATION, None)) if easy else None
    easy = _part(easy, slice(0, -_EASY_VQA_VALIDATION)) if easy else None
    validation = _validation_pools(work, settings.validation_scenes, held_easy, threads)
    model = build_model(settings.seed)
    heads = PatchHeads(model.model.vision_tower.config.hidden_size)
    phrase_heads = PhraseHeads(model.config.get_text_config().hidden_size)
    with Stop() as stop:
        train_vision(model, heads, pool, easy, settings, work, stop, workers, resume=resume)
        if stop.asked:
            return False
        outcome = train_answers(
            model, heads, phrase_heads, pool, easy, validation, settings, work, stop, workers, resume=resume
        )
    save_checkpoint(model, output)
    record = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scenes": len(pool),
        "scene_questions": sum(map(len, pool.questions)),
        "easy_vqa_images": len(easy) if easy else 0,
        "easy_vqa_questions": sum(map(len, easy.questions)) if easy else 0,
        **outcome,
    }
    _write_record(output, record)
    return True


def _write_record(output: Path, record: dict) -> None:
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def record_accuracy(work: Path, output: Path, *, num_held_out: int, use_easy_vqa: bool) -> dict:
    """Measure the checkpoint in ``output`` on held-out questions, beside guesses learnt from the training questions in
    ``work``, and add the counts of right answers and questions per kind to ``training.json``."""
    asked = [question for rows in load_pool(work / "pool").questions for question in rows]
    if use_easy_vqa:
        asked += [question for _, rows in easy_vqa("train") for question in rows]
    model, _ = load_tiny_lvlm(output)
    results = evaluate(model, num_held_out=num_held_out, use_easy_vqa=use_easy_vqa, guesses=prior(asked))
    subset = held_out_pool(SUBSET)
    right, _ = np.sum(list(packed_accuracy(model, subset, tokenize(subset)).values()), axis=0)
    record = json.loads((output / "training.json").read_text())
    record["accuracy"] = results
    # So that a test can repeat a piece of the evaluation in seconds.
    record["held_out_subset"] = {"questions": SUBSET, "right": int(right)}
    _write_record(output, record)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lvlm_fastxai.tiny.train",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for option in fields(Settings):
        flag, meaning = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        parser.add_argument(flag, type=type(option.default), default=option.default, metavar="N", help=meaning)
    parser.add_argument("--work", type=Path, default=Path(".cache/tiny"), help="scenes, state and log of the run")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where the checkpoint goes")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, and processes that render")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--no-easy-vqa", action="store_true", help="train and evaluate without the package easy-vqa")
    parser.add_argument("--held-out", type=int, default=3000, metavar="N", help="held-out questions of the evaluation")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the checkpoint in --output; train nothing")
    parsed = vars(parser.parse_args(arguments))
    work, output, threads, num_held_out, only_evaluate, resume = (
        parsed.pop(name) for name in ("work", "output", "threads", "held_out", "evaluate", "resume")
    )
    use_easy_vqa = not parsed.pop("no_easy_vqa")
    torch.set_num_threads(threads)
    settings = Settings(**parsed)
    if not only_evaluate and not train(
        settings, work, output, threads=threads, resume=resume, use_easy_vqa=use_easy_vqa
    ):
        print(f"stopped before the model could answer; --resume goes on from {work}")
        return 1
    results = record_accuracy(work, output, num_held_out=num_held_out, use_easy_vqa=use_easy_vqa)
    for name, accuracy in results.items():
        print(f"{name}: {show(accuracy)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
