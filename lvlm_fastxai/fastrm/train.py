"""``lvlm-fastxai fastrm train``: a head learns to predict exact maps from hidden states."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentError
from ..files import writing_folder
from ..prompting.answering import Answerer
from ..training.processes import join_processes
from ..training.schedule import warm_up_then_cosine
from .head import FastRM, FastRMConfig, initial_bias, min_max
from .states import Item, Items, States, read_states

BINS = 400  # of the scores, for the decision threshold
READ_AT_ONCE = 64  # samples whose states are read before the next are

# stage, done, total
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainSettings:
    """How a head is trained. Where the paper says nothing, the choice is ours; docs/fastrm.md has the ablation.

    Attributes:
        layer, dim, query_width, norm, activation: of the head; see `FastRMConfig`.
        binarisation: a column is a positive target where the min–max normalised relevancy is above it (paper: 0.3).
        class_weight: positive columns weigh ((1 − s) / s) ** class_weight in the loss, s their share; 0: all alike.
        epochs: at most; training stops when `patience` epochs in a row brought no better validation F1.
        batch: answers per step and process.
        learning_rate, weight_decay: of AdamW; the rate follows one cosine after a tenth of warm-up.
        validation_share: of the samples, the last ones, where no validation maps are given.
        cache_gib: hidden states are kept in memory up to this size, and read again in every epoch beyond.
        seed: of the weights and the order.

    Raises:
        ArgumentError: a value outside its range.
    """

    layer: int = -2
    dim: int = 64
    query_width: int = 256
    norm: str = "layer"
    activation: str = "sigmoid"
    binarisation: float = 0.3
    class_weight: float = 0.0
    epochs: int = 8
    patience: int = 5
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    validation_share: float = 0.1
    cache_gib: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch", "dim"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.validation_share < 1:
            raise ArgumentError(f"validation_share: expected a number between 0 and 1, got {self.validation_share}")
        if self.learning_rate <= 0:
            raise ArgumentError(f"learning_rate: expected a positive number, got {self.learning_rate}")


@dataclass
class Trained:
    """A trained head, the validation F1 it was chosen by, and what each epoch brought."""

    head: FastRM
    f1: float
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Answers put side by side.

    Attributes:
        hidden: (B, n, D) hidden states, padded with zeros. state: (B, T, D), likewise.
        target: (B, T, n) fp32, 1 where a column is relevant. real: (B, T, n) bool, False at padding.
    """

    hidden: Tensor
    state: Tensor
    target: Tensor
    real: Tensor


class StateCache:
    """States of items, read by the model once where they fit in memory and again where they do not."""

    def __init__(self, answerer: Answerer, items: Sequence[Item], layers: Sequence[int], budget: float) -> None:
        self._answerer, self._items, self._layers = answerer, items, tuple(layers)
        self._budget = budget
        self._kept: dict[int, States] = {}

    def __len__(self) -> int:
        return len(self._items)

    def first(self, count: int) -> StateCache:
        """Give the first items only; what is read for them is kept for both."""
        part = StateCache(self._answerer, self._items[:count], self._layers, self._budget)
        part._kept = self._kept
        return part

    def take(self, indices: Sequence[int]) -> list[tuple[Item, States]]:
        """Give items with their states."""
        missing = [index for index in indices if index not in self._kept]
        items = {index: self._items[index] for index in indices}
        read: dict[int, States] = {}
        if missing:
            found = read_states(
                self._answerer,
                [items[index].sample for index in missing],
                [items[index].record.token_ids for index in missing],
                self._layers,
                READ_AT_ONCE,
            )
            read = dict(zip(missing, found, strict=True))
            for index, states in read.items():
                size = sum(tensor.nbytes for part in (states.hidden, states.state) for tensor in part.values())
                if size <= self._budget:
                    self._budget -= size
                    self._kept[index] = states
        return [(items[index], self._kept.get(index) or read[index]) for index in indices]


def collate(taken: Sequence[tuple[Item, States]], layer: int, binarisation: float, device: Any) -> Batch:
    """Pad answers to one batch at one layer."""
    lengths = [len(item.record.token_ids) for item, _ in taken]
    columns = [item.record.maps.shape[1] for item, _ in taken]
    width = taken[0][1].hidden[layer].shape[1]
    hidden = torch.zeros(len(taken), max(columns), width)
    state = torch.zeros(len(taken), max(lengths), width)
    target = torch.zeros(len(taken), max(lengths), max(columns))
    real = torch.zeros(target.shape, dtype=torch.bool)
    for row, ((item, states), tokens, n) in enumerate(zip(taken, lengths, columns, strict=True)):
        hidden[row, :n] = states.hidden[layer]
        state[row, :tokens] = states.state[layer]
        target[row, :tokens, :n] = binary_target(torch.from_numpy(np.ascontiguousarray(item.record.maps)), binarisation)
        real[row, :tokens, :n] = True
    return Batch(*(tensor.to(device) for tensor in (hidden, state, target, real)))


def binary_target(maps: Tensor, binarisation: float) -> Tensor:
    """Compute y = 1[minmax(r) > binarisation] for maps (…, n)."""
    return (min_max(maps) > binarisation).float()


def loss_of(head: nn.Module, batch: Batch, config: FastRMConfig, positive_weight: float) -> Tensor:
    """Compute class-weighted binary cross-entropy; for a softmax, cross-entropy with the targets as a distribution."""
    scores = head(batch.hidden, batch.state)
    if config.activation == "softmax":
        has_any = (batch.target.sum(-1) > 0).float()
        wanted = batch.target / batch.target.sum(-1, keepdim=True).clamp(min=1)
        # A finite floor: the padding's target of 0 times −inf would be NaN.
        logarithm = scores.masked_fill(~batch.real, -1e4).log_softmax(-1)
        return -((wanted * logarithm).sum(-1) * has_any).sum() / has_any.sum().clamp(min=1)
    weight = torch.tensor(positive_weight, device=scores.device)
    each = functional.binary_cross_entropy_with_logits(scores, batch.target, pos_weight=weight, reduction="none")
    return each[batch.real].mean()


def train_head(
    answerer: Answerer,
    items: Items | Sequence[Item],
    validation: Items | Sequence[Item] | None,
    config: FastRMConfig,
    settings: TrainSettings,
    *,
    caches: tuple[StateCache, StateCache] | None = None,
    progress: Progress | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """Train one head; under ``torchrun`` or ``accelerate launch`` every process with its share of the answers.

    Args:
        answerer: the model that the maps are of, and its processor.
        items: to learn from.
        validation: to choose the epoch and the decision threshold by; None: the last ``validation_share`` of the items.
        config: what the head is; `TrainSettings`' own fields of the head replace its.
        settings: see `TrainSettings`.
        caches: of both sets' states, to train several heads on the same; else they are made here.
        progress: called as ``progress(stage, done, total)``.
        log: called on the first process with each epoch's number and figures.

    Raises:
        ArgumentError: too few samples, or no positive column among them; accelerate is not installed.
    """
    state = join_processes(answerer.model.device.type)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=answerer.model.device.type == "cpu")
    own = ("layer", "dim", "query_width", "norm", "activation", "binarisation")
    config = replace(config, **{name: getattr(settings, name) for name in own})
    if validation is None:
        cut = len(items) - max(1, round(len(items) * settings.validation_share))
        items, validation = items[:cut], items[cut:]
    if not len(items) or not len(validation):
        raise ArgumentError("maps: too few samples to train on and to validate with")
    learn, check = caches or _share(answerer, items, validation, config, settings, state)

    torch.manual_seed(settings.seed)
    positive = _positive_share(items, config.binarisation)
    if not 0 < positive < 1:
        raise ArgumentError("maps: every column is relevant, or none is; there is nothing to learn")
    head = FastRM(config).to(accelerator.device)
    if config.activation == "sigmoid":
        nn.init.constant_(head.bias, initial_bias(positive))
    head.mean_map = _mean_map(items).to(accelerator.device)
    weight = ((1 - positive) / positive) ** settings.class_weight
    report = progress or (lambda stage, done, total: None)
    return _Fit(head, learn, check, settings, accelerator, weight, report).run(log)


def _share(
    answerer: Answerer,
    items: Sequence[Item],
    validation: Sequence[Item],
    config: FastRMConfig,
    settings: TrainSettings,
    state: Any,
) -> tuple[StateCache, StateCache]:
    """This process's share of both sets."""
    rank, world = state.process_index, state.num_processes
    # Each process owns every world-th sample; with one more round all have as many.
    own = [items[index % len(items)] for index in range(rank, -(-len(items) // world) * world, world)]
    budget = settings.cache_gib * 2**30
    learn = StateCache(answerer, own, [config.layer], budget * 0.9)
    return learn, StateCache(answerer, validation[rank::world], [config.layer], budget * 0.1)


class _Fit:
    """The epochs of one head's training, until their number or until nothing gets better."""

    def __init__(
        self,
        head: FastRM,
        learn: StateCache,
        check: StateCache,
        settings: TrainSettings,
        accelerator: Any,
        positive_weight: float,
        report: Progress,
    ) -> None:
        self._head, self._learn, self._check, self._settings = head, learn, check, settings
        self._accelerator, self._weight, self._report = accelerator, positive_weight, report
        self._steps = -(-len(learn) // settings.batch)
        optimizer = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
        total = self._steps * settings.epochs
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, total))
        self._trainer, self._optimizer = accelerator.prepare(head, optimizer)
        self._rng = np.random.default_rng([settings.seed, 17, accelerator.process_index])

    def run(self, log: Callable[[int, dict[str, float]], None] | None) -> Trained:
        """Train, and give the head of the epoch with the best validation F1."""
        best: tuple[float, float, dict[str, Tensor]] | None = None
        history: list[dict[str, float]] = []
        since = 0
        for epoch in range(1, self._settings.epochs + 1):
            loss = self._epoch(f"epoch {epoch} of {self._settings.epochs}")
            f1, threshold = self._validate()
            figures = {"loss": loss, "f1": f1, "threshold": threshold}
            history.append({"epoch": epoch, **figures})
            if self._accelerator.is_main_process and log is not None:
                log(epoch, figures)
            if best is None or f1 > best[0]:
                best, since = (f1, threshold, copy.deepcopy(self._head.state_dict())), 0
            else:
                since += 1
                if since >= self._settings.patience:
                    break
        assert best is not None
        self._head.load_state_dict(best[2])
        self._head.config = replace(self._head.config, decision_threshold=best[1])
        return Trained(self._head.cpu().eval(), best[0], history)

    def _epoch(self, stage: str) -> float:
        """Pass once over the answers; the mean loss of all processes."""
        config, device = self._head.config, self._accelerator.device
        self._head.train()
        total = torch.zeros((), device=device)
        for number, indices in enumerate(_batches(self._rng.permutation(len(self._learn)), self._settings.batch), 1):
            batch = collate(self._learn.take(indices), config.layer, config.binarisation, device)
            loss = loss_of(self._trainer, batch, config, self._weight)
            self._optimizer.zero_grad()
            self._accelerator.backward(loss)
            self._optimizer.step()
            self._schedule.step()
            total += loss.detach()
            self._report(stage, number, self._steps)
        return float(self._accelerator.reduce(total, reduction="mean")) / self._steps

    def _validate(self) -> tuple[float, float]:
        """The best F1 on the validation answers of all processes, and its threshold."""
        self._head.eval()
        counts = _count(self._head, self._check, self._head.config, self._settings.batch, self._accelerator.device)
        return _best_threshold(self._accelerator.reduce(counts, reduction="sum").cpu())


def _batches(order: np.ndarray, size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size].tolist()


def _positive_share(items: Sequence[Item], binarisation: float) -> float:
    found = [binary_target(torch.from_numpy(items[i].record.maps), binarisation) for i in range(len(items))]
    return float(sum(target.sum() for target in found) / sum(target.numel() for target in found))


def _mean_map(items: Sequence[Item]) -> Tensor:
    """Mean of all maps after min–max; empty where they have different numbers of columns."""
    maps = [min_max(torch.from_numpy(items[i].record.maps)) for i in range(len(items))]
    return torch.cat(maps).mean(0) if len({found.shape[1] for found in maps}) == 1 else torch.zeros(0)


@torch.no_grad()
def _count(head: FastRM, cache: StateCache, config: FastRMConfig, size: int, device: Any) -> Tensor:
    """(2, BINS): columns by target and by the bin of their predicted value."""
    counts = torch.zeros(2, BINS, dtype=torch.float64)
    for start in range(0, len(cache), size):
        batch = collate(
            cache.take(range(start, min(start + size, len(cache)))), config.layer, config.binarisation, device
        )
        scores = head(batch.hidden, batch.state)
        if config.activation == "softmax":
            values = scores.masked_fill(~batch.real, -1e4).softmax(-1)
            # The least of a map is that of its own columns, not the padding's 0.
            values = min_max(torch.where(batch.real, values, values.amax(-1, keepdim=True)))
        else:
            values = scores.sigmoid()
        bins = (values[batch.real] * BINS).long().clamp(max=BINS - 1)
        for target in (0, 1):
            counts[target] += torch.bincount(bins[batch.target[batch.real] == target].cpu(), minlength=BINS)
    return counts.to(device)


def _best_threshold(counts: Tensor) -> tuple[float, float]:
    """The highest F1 that a threshold reaches, and that threshold."""
    wrong, right = counts.flip(1).cumsum(1).flip(1)  # predicted positive from each bin on
    f1 = 2 * right / (wrong + right + counts[1].sum()).clamp(min=1)
    place = int(f1[1:].argmax()) + 1
    return float(f1[place]), place / BINS


def write_training(folder: Path, trained: Trained, settings: TrainSettings, maps: Sequence[Any]) -> None:
    """Write the head, and ``training.json`` with the settings, the maps and every epoch's figures.

    A head that is in the folder stays as it is until all files of the new one are complete.

    Raises:
        ArgumentError: the folder cannot be written.
    """
    record = {
        "settings": asdict(settings),
        "maps": [found.settings for found in maps],
        "validation_f1": trained.f1,
        "history": trained.history,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    with writing_folder(folder, argument="--out") as scratch:
        trained.head.write_files(scratch)
        (scratch / "training.json").write_text(text, encoding="utf-8")
