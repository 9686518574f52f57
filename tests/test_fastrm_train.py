"""Heads in training and in use: states, loss, thresholds, two processes, scores by formula, the commands, answers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import lvlm_fastxai as fx
from lvlm_fastxai import cli
from lvlm_fastxai.errors import ArgumentError, ModelMismatchError
from lvlm_fastxai.fastrm import train
from lvlm_fastxai.fastrm.answers import LiveAnswer, live_answers
from lvlm_fastxai.fastrm.build import build_maps
from lvlm_fastxai.fastrm.evaluate import THRESHOLDS, TokenScore, _summary, evaluate_head
from lvlm_fastxai.fastrm.head import FastRM, FastRMConfig
from lvlm_fastxai.fastrm.shards import MapRecord, open_maps
from lvlm_fastxai.fastrm.states import Item, Items, States, read_states
from lvlm_fastxai.fastrm.train import StateCache, Trained, TrainSettings, collate, loss_of, train_head
from lvlm_fastxai.models.fingerprint import fingerprint
from lvlm_fastxai.prompting.answering import Answerer
from lvlm_fastxai.prompting.sources import Sample, open_source
from lvlm_fastxai.tiny.model import build_model, build_processor, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = "scenes:train?count=24&seed=3&kinds=color,relation,description,count"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """One thread for what module fixtures compute as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return fx.load_tiny_lvlm()


@pytest.fixture(scope="module")
def maps(lvlm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact maps of 24 questions."""
    folder = tmp_path_factory.mktemp("built") / "maps"
    build_maps(*lvlm, open_source(SPEC), folder, shard_size=8)
    return folder


@pytest.fixture(scope="module")
def decisions(lvlm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight decisions as `review export` writes them; of two, a person has corrected the answer."""
    folder = tmp_path_factory.mktemp("decisions")
    lines = []
    for number, sample in enumerate(open_source("scenes:validation?count=8&kinds=color,shape")):
        sample.picture().save(folder / f"{number}.png")
        answer = "circle" if number in (1, 3) else sample.answer
        lines.append(
            {
                "image": f"{number}.png",
                "question": sample.question,
                "answer": answer,
                "verdict": "right",
                "item": number,
            }
        )
    path = folder / "decisions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def answerer(lvlm: tuple[Any, Any]) -> Answerer:
    return Answerer(*lvlm)


@pytest.fixture(scope="module")
def head(lvlm: tuple[Any, Any]) -> FastRM:
    """Of the shipped LVLM, with weights that are drawn."""
    torch.manual_seed(4)
    model = lvlm[0]
    config = FastRMConfig(
        192, layer=-1, dim=8, query_width=0, model_name="the shipped LVLM", model_fingerprint=fingerprint(model)
    )
    head = FastRM(config)
    torch.nn.init.normal_(head.key.weight, std=0.3)
    head.mean_map = torch.rand(144)
    return head.eval()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


# Samples and their states


def test_items_are_the_maps_with_their_samples(maps: Path) -> None:
    source = open_source(SPEC)
    items = Items([open_maps(maps)])
    assert len(items) == len(source) == 24 and len(items[3:5]) == 2
    for number in (0, 7, 23):
        assert items[number].record.index == number
        assert items[number].sample == source[number] and items[number].sample.id == items[number].record.id
    assert len(Items([open_maps(maps)] * 2)) == 48


def test_answers_without_a_token_are_left_out(maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_maps(maps)
    records = [replace(record, token_ids=record.token_ids * (record.index != 5)) for record in found.records()]
    monkeypatch.setattr(found, "records", lambda: iter(records))
    assert [item.record.index for item in Items([found])] == [number for number in range(24) if number != 5]


def test_a_source_has_to_be_what_it_was(lvlm: tuple[Any, Any], maps: Path, decisions: Path, tmp_path: Path) -> None:
    path = tmp_path / "here" / "decisions.jsonl"
    path.parent.mkdir()
    lines = decisions.read_text().splitlines()[:2]
    path.write_text("\n".join(lines) + "\n")
    for name in ("0.png", "1.png"):
        (path.parent / name).write_bytes((decisions.parent / name).read_bytes())
    build_maps(*lvlm, open_source(str(path)), tmp_path / "maps", answers="reference")
    found = open_maps(tmp_path / "maps")
    with pytest.raises(
        ArgumentError, match=r"was built from decisions.jsonl, which is not among the sources.*--source"
    ):
        Items([found])
    moved = path.parent.rename(tmp_path / "there") / path.name
    assert Items([found], [open_source(str(moved))])[1].sample.answer == "circle"
    moved.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ArgumentError, match="not among the sources"):
        Items([found], [open_source(str(moved))])
    scenes = open_maps(maps)
    scenes.source_digest = "0" * 64
    with pytest.raises(ArgumentError, match="not among the sources"):
        Items([scenes])


def test_maps_of_several_models_are_no_training_set(maps: Path) -> None:
    other = open_maps(maps)
    other.model, other.model_fingerprint = "llava", "0" * 16
    with pytest.raises(ArgumentError, match=r"of several models \(.*the shipped LVLM.* of llava\)"):
        Items([open_maps(maps), other])


def test_states_are_the_layers_outputs(answerer: Answerer, maps: Path) -> None:
    """Answers of several lengths in batches with padding, against passes over each alone."""
    items = Items([open_maps(maps)])[:12]
    answers = [item.record.token_ids for item in items]
    assert len(set(map(len, answers))) > 2
    samples = [item.sample for item in items]
    model = answerer.model
    before = [len(module._forward_hooks) for module in model.modules()]
    found = read_states(answerer, samples, answers, [-1, -2, 0], batch=5)
    assert [len(module._forward_hooks) for module in model.modules()] == before
    for sample, answer, states in zip(samples, answers, found, strict=True):
        prompt = answerer.encode([sample.picture()], [sample.question])
        start = prompt["input_ids"].shape[1]
        with torch.no_grad():
            hidden = model.model(**answerer.join(prompt, [answer]), output_hidden_states=True).hidden_states
        columns = (prompt["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]
        norm = model.model.language_model.norm
        for layer, wanted in ((-1, hidden[-1]), (-2, hidden[-2]), (0, hidden[1])):
            read = norm if layer == -1 else torch.nn.Identity()
            own = read(states.hidden[layer]), read(states.state[layer])
            assert own[0].shape == (144, 192) and own[1].shape == (len(answer), 192)
            torch.testing.assert_close(own[0], wanted[0, columns], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(own[1], wanted[0, start - 1 : start - 1 + len(answer)], rtol=1e-3, atol=1e-4)


def test_a_layer_that_is_not_there(answerer: Answerer, maps: Path) -> None:
    (item,) = Items([open_maps(maps)])[:1]
    with pytest.raises(ArgumentError, match=r"layer: expected -4 … 3, got 4"):
        read_states(answerer, [item.sample], [item.record.token_ids], [4], 1)


@pytest.mark.parametrize(("budget", "passes"), [(1e9, 1), (0.0, 3), (144 * 192 * 4 * 1.5, 3)])
def test_states_that_do_not_fit_are_read_again(
    answerer: Answerer, maps: Path, monkeypatch: pytest.MonkeyPatch, budget: float, passes: int
) -> None:
    items = Items([open_maps(maps)])[:4]
    cache = StateCache(answerer, items, [-1], budget)
    first = cache.take([2, 0, 1])
    asked: list[int] = []

    def count(answerer: Answerer, samples: Sequence[Sample], *rest: Any) -> list[States]:
        asked.append(len(samples))
        return read_states(answerer, samples, *rest)

    monkeypatch.setattr(train, "read_states", count)
    for _ in range(2):
        again = cache.take([2, 0, 1])
        for (item, states), (other, wanted) in zip(again, first, strict=True):
            assert item is other and torch.equal(states.hidden[-1], wanted.hidden[-1])
    assert len(asked) == passes - 1
    part = cache.first(2)
    assert len(part) == 2 and torch.equal(part.take([0])[0][1].state[-1], first[1][1].state[-1])


# The loss, and training on states from which the maps can be read


WIDTH, COLOURS = 16, 4


class Known(StateCache):
    """States that are given, not read."""

    def __init__(self, taken: Sequence[tuple[Item, States]]) -> None:
        self.taken = list(taken)

    def __len__(self) -> int:
        return len(self.taken)

    def take(self, indices: Sequence[int]) -> list[tuple[Item, States]]:
        return [self.taken[index] for index in indices]


def invented(count: int, seed: int, columns: Sequence[int] = (12,), noise: float = 0.3) -> Known:
    """Answers whose tokens ask for a colour and whose columns show one: relevant is where both are the same."""
    codes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0][:COLOURS] * 4
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(COLOURS, shape, generator=generator)

    taken = []
    for number in range(count):
        n, tokens = columns[number % len(columns)], number % 3 + 1
        shown, asked = draw(n), draw(tokens)
        shown[:COLOURS] = torch.arange(COLOURS)
        maps = (shown == asked[:, None]) + 0.2 * torch.rand(tokens, n, generator=generator)
        hidden = codes[shown] + noise * torch.randn(n, WIDTH, generator=generator)
        state = codes[asked] + noise * torch.randn(tokens, WIDTH, generator=generator)
        record = MapRecord(number, str(number), "", [1] * tokens, None, maps.numpy(), (1, n))
        taken.append((Item(None, record), States({-1: hidden}, {-1: state})))  # type: ignore[arg-type]
    return Known(taken)


def learn(settings: TrainSettings, learned: Known, validation: Known, **config: Any) -> Trained:
    """A head from states that are given; no model is needed."""
    return train_head(
        SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu"))),  # type: ignore[arg-type]
        [item for item, _ in learned.taken],
        [item for item, _ in validation.taken],
        FastRMConfig(WIDTH, **config),
        settings,
        caches=(learned, validation),
    )


QUICK = TrainSettings(
    layer=-1, dim=8, query_width=0, norm="rms", class_weight=0.5, epochs=25, patience=25, batch=16, learning_rate=2e-2
)


def f1_of(known: Known, predict: Callable[[MapRecord, States], Tensor], threshold: float) -> float:
    """Of all columns together, by counting."""
    right = wrong = missed = 0
    for item, states in known.taken:
        maps = item.record.maps
        low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
        target = (maps - low) / (high - low) > 0.3
        found = predict(item.record, states).numpy() >= threshold
        right += int((found & target).sum())
        wrong += int((found & ~target).sum())
        missed += int((~found & target).sum())
    return 2 * right / (2 * right + wrong + missed)


def predicted(head: FastRM) -> Callable[[MapRecord, States], Tensor]:
    def predict(record: MapRecord, states: States) -> Tensor:
        found = head.predict(states.hidden[-1][None], states.state[-1][None]).map[0]
        if head.config.activation == "softmax":
            low, high = found.min(-1, keepdim=True).values, found.max(-1, keepdim=True).values
            found = (found - low) / (high - low)
        return found

    return predict


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("seed", range(4))
def test_padding_does_not_change_the_loss(activation: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = FastRMConfig(WIDTH, activation=activation)
    head = FastRM(config)
    taken = invented(5, seed, columns=(12, 7, 4, 9, 5)).taken
    taken[3][0].record.maps[0] = 0.5  # says nothing: no column is relevant
    batch = collate(taken, -1, 0.3, "cpu")
    alone, weights = [], []
    for one in taken:
        single = collate([one], -1, 0.3, "cpu")
        assert single.real.all()
        alone.append(loss_of(head, single, config, 2.5))
        # Sigmoid: the mean over columns; softmax: over tokens that have a relevant one.
        rows = single.target.sum(-1) > 0
        weights.append(single.target.numel() if activation == "sigmoid" else int(rows.sum()))
    wanted = sum(loss * weight for loss, weight in zip(alone, weights, strict=True)) / sum(weights)
    found = loss_of(head, batch, config, 2.5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    filled = replace(
        batch,
        hidden=batch.hidden.masked_fill(~batch.real.any(1)[:, :, None], 50.0),
        state=batch.state.masked_fill(~batch.real.any(2)[:, :, None], -50.0),
    )
    torch.testing.assert_close(loss_of(head, filled, config, 2.5), found, rtol=0, atol=0)
    found.backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_the_loss_is_class_weighted_cross_entropy() -> None:
    torch.manual_seed(0)
    config = FastRMConfig(WIDTH)
    head = FastRM(config)
    batch = collate(invented(1, 0).taken, -1, 0.3, "cpu")
    m, y = head(batch.hidden, batch.state).sigmoid(), batch.target
    wanted = -(3.0 * y * m.log() + (1 - y) * (1 - m).log()).mean()
    torch.testing.assert_close(loss_of(head, batch, config, 3.0), wanted)


@pytest.mark.parametrize("columns", [(12,), (12, 7, 9)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_what_can_be_read_is_learned(activation: str, norm: str, columns: tuple[int, ...]) -> None:
    learned, validation = invented(96, 1, columns), invented(32, 2, columns)
    trained = learn(replace(QUICK, activation=activation, norm=norm), learned, validation)
    config = trained.head.config
    assert (config.activation, config.norm, config.dim) == (activation, norm, 8) and not trained.head.training
    assert trained.f1 == max(epoch["f1"] for epoch in trained.history)
    # What a map is called positive by when it is used, on the maps as they are when they are used.
    found = f1_of(validation, predicted(trained.head), config.decision_threshold)
    assert found == pytest.approx(trained.f1, abs=1e-3) and found > 0.9
    if len(columns) > 1:
        assert trained.head.mean_map.shape == (0,)
        return
    mean = trained.head.mean_map
    best = max(f1_of(validation, lambda record, states: mean.expand(len(record.maps), -1), t) for t in mean.tolist())
    assert best < 0.6
    maps = np.concatenate([item.record.maps for item, _ in learned.taken])
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    np.testing.assert_allclose(mean.numpy(), ((maps - low) / (high - low)).mean(0), rtol=1e-5)


def test_the_seed_decides_everything() -> None:
    def weights(seed: int) -> bytes:
        trained = learn(replace(QUICK, epochs=3, seed=seed), invented(40, 1), invented(8, 2))
        return b"".join(value.numpy().tobytes() for value in trained.head.state_dict().values())

    first = weights(0)
    torch.manual_seed(5)  # the caller's own numbers do not matter
    assert weights(0) == first != weights(1)


def test_training_stops_when_nothing_gets_better() -> None:
    settings = replace(QUICK, epochs=60, patience=3)
    validation = invented(16, 2, noise=3)
    trained = learn(settings, invented(32, 1, noise=3), validation)
    f1 = [epoch["f1"] for epoch in trained.history]
    best = int(np.argmax(f1))
    assert len(f1) == best + 1 + settings.patience < settings.epochs
    assert trained.history[best]["threshold"] == trained.head.config.decision_threshold
    assert [epoch["epoch"] for epoch in trained.history] == list(range(1, len(f1) + 1))
    assert f1[-1] < f1[best]  # so it is not the last epoch's weights that make the figure
    found = f1_of(validation, predicted(trained.head), trained.head.config.decision_threshold)
    assert found == pytest.approx(f1[best], abs=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_columns_are_counted_by_target_and_value(activation: str) -> None:
    """In padded batches, by the values that a map has where it is used."""
    torch.manual_seed(0)
    head = FastRM(FastRMConfig(WIDTH, layer=-1, activation=activation)).eval()
    known = invented(11, 5, columns=(12, 5, 8))
    counts = train._count(head, known, head.config, 4, "cpu")
    values: list[list[float]] = [[], []]
    for item, states in known.taken:
        maps = torch.from_numpy(item.record.maps)
        low, high = maps.min(1, keepdim=True).values, maps.max(1, keepdim=True).values
        found, target = predicted(head)(item.record, states), (maps - low) / (high - low) > 0.3
        for group in (0, 1):
            values[group] += found[target == bool(group)].tolist()
    for group in (0, 1):
        wanted, _ = np.histogram(values[group], bins=train.BINS, range=(0, 1))
        # A value at the edge of two bins may fall into either.
        assert np.abs(np.cumsum(counts[group].numpy()) - np.cumsum(wanted)).max() <= 1
        assert counts[group].sum() == len(values[group])


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_that_of_the_best_f1(seed: int) -> None:
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, (2, train.BINS)).astype(float))
    f1 = {}
    for place in range(1, train.BINS):
        wrong, right = counts[0, place:].sum(), counts[1, place:].sum()
        f1[place / train.BINS] = float(2 * right / (right + wrong + counts[1].sum()))
    found, threshold = train._best_threshold(counts)
    assert found == pytest.approx(max(f1.values())) and f1[threshold] == pytest.approx(found)
    assert train._best_threshold(torch.zeros(2, train.BINS))[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch": -1}, "batch: expected at least 1"),
        ({"validation_share": 1.0}, "validation_share: expected a number between 0 and 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainSettings(**settings)


def test_nothing_to_learn() -> None:
    some = invented(4, 0)
    with pytest.raises(ArgumentError, match="too few samples"):
        learn(QUICK, some, Known([]))
    for item, _ in some.taken:
        item.record.maps[:] = 1.0
    with pytest.raises(ArgumentError, match="nothing to learn"):
        learn(QUICK, some, some)


def test_accelerate_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ArgumentError, match=r"pip install 'lvlm_fastxai\[fastrm\]'"):
        learn(QUICK, invented(4, 0), invented(4, 1))


# Scores


def test_scores_are_those_of_their_formulas(answerer: Answerer, head: FastRM, maps: Path) -> None:
    items = Items([open_maps(maps)])[:9]
    steps: list[tuple[int, int]] = []
    found = evaluate_head(head, answerer, items, batch=4, resamples=50, progress=lambda *step: steps.append(step))
    assert steps == [(4, 9), (8, 9), (9, 9)]
    rows: dict[str, list[np.ndarray]] = {"fastrm": [], "raw_attention": [], "mean_map": [], "exact": []}
    kinds: list[str] = []
    for item in items:
        sample, tokens = item.sample, item.record.token_ids
        prompt = answerer.encode([sample.picture()], [sample.question])
        start = prompt["input_ids"].shape[1]
        columns = (prompt["input_ids"][0] == answerer.model.config.image_token_index).nonzero()[:, 0]
        joined = answerer.join(prompt, [tokens])
        (states,) = read_states(answerer, [sample], [tokens], [-1], 1)
        targets = [(0, start - 1 + step, token) for step, token in enumerate(tokens)]
        attention = fx.relevancy_rows(answerer.model, joined, targets, method="raw_attention", prompt_length=start)
        rows["fastrm"] += [*head.predict(states.hidden[-1][None], states.state[-1][None]).map[0].numpy()]
        rows["raw_attention"] += [*attention[:, columns].numpy()]
        rows["mean_map"] += [head.mean_map.numpy()] * len(tokens)
        rows["exact"] += [*item.record.maps]
        kinds += [sample.kind or ""] * len(tokens)
    values = {name: np.stack(lines).astype(np.float64) for name, lines in rows.items()}
    exact = values.pop("exact")

    def relative(of: np.ndarray) -> np.ndarray:
        low, high = of.min(1, keepdims=True), of.max(1, keepdims=True)
        return (of - low) / (high - low)

    target = relative(exact) > 0.3
    assert found["tokens"] == len(exact) > found["answers"] == 9
    assert found["positive_share"] == pytest.approx(target.mean())
    assert list(found["groups"]) == ["all", *sorted(set(kinds))]
    for group, scores in found["groups"].items():
        inside = np.array([group in ("all", kind) for kind in kinds])
        want = target[inside]
        for name, of in values.items():
            chosen = of > head.config.decision_threshold if name == "fastrm" else relative(of) > 0.3
            chosen, one = chosen[inside], scores[name]
            both, either = (chosen & want).sum(), (chosen | want).sum()
            assert one["f1"][0] == pytest.approx(2 * both / (chosen.sum() + want.sum()), rel=1e-3)
            assert one["iou"][0] == pytest.approx(both / either, rel=1e-3)
            assert one["accuracy"][0] == pytest.approx((chosen == want).mean(), rel=1e-3)
            own = (of if name == "fastrm" else relative(of))[inside]
            sweep = [2 * ((own > t) & want).sum() / ((own > t).sum() + want.sum()) for t in THRESHOLDS]
            assert one["best_f1"][0] == pytest.approx(max(sweep), rel=1e-3)
            ranks = [spearmanr(a, b).statistic for a, b in zip(of[inside], exact[inside], strict=True)]
            assert one["rank_correlation"][0] == pytest.approx(np.mean(ranks), abs=1e-3)
            assert 0 <= one["pointing_game"][0] <= 1 and 0 < one["mass_in_mask"][0] < 1
            if group == "all":
                assert one["f1"][1] <= one["f1"][0] <= one["f1"][2]
        assert set(scores["exact"]) == {"pointing_game", "mass_in_mask"}
    whole = found["groups"]["all"]
    assert whole["exact"]["mass_in_mask"][0] > whole["mean_map"]["mass_in_mask"][0]


def test_an_exact_prediction_scores_one(
    answerer: Answerer, head: FastRM, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps that are the exact ones at every threshold of theirs, and a mean map of other pictures' size."""
    items = Items([open_maps(maps)])[:3]
    own = FastRM(replace(head.config, activation="softmax", decision_threshold=0.3))
    own.mean_map = torch.rand(99)
    exact = iter([torch.from_numpy(item.record.maps) for item in items])
    monkeypatch.setattr(own, "predict", lambda hidden, state: SimpleNamespace(map=next(exact)[None]))
    scores = evaluate_head(own, answerer, items, resamples=10)["groups"]["all"]
    assert all(scores["fastrm"][name][0] == 1 for name in ("f1", "best_f1", "iou", "accuracy"))
    assert scores["fastrm"]["rank_correlation"][0] == pytest.approx(1)
    assert scores["fastrm"]["mass_in_mask"] == scores["exact"]["mass_in_mask"]
    assert set(scores) == {"fastrm", "raw_attention", "exact"}


def test_pictures_without_a_mean_map_do_not_count_for_it() -> None:
    sweep = np.ones((len(THRESHOLDS), 3), dtype=np.int64)
    one = TokenScore("", 0, {"mean_map": (1, 2, 3, 4)}, {"mean_map": sweep}, {"mean_map": {"rank_correlation": 0.5}})
    none = TokenScore("", 1, {"fastrm": (1, 1, 1, 1)}, {"fastrm": sweep}, {"fastrm": {"rank_correlation": 0.1}})
    for found in ([one, none], [none, one]):
        summary = _summary(found, 10)
        assert summary["mean_map"]["f1"][0] == pytest.approx(2 / 7)
        assert summary["mean_map"]["rank_correlation"][0] == 0.5 and summary["fastrm"]["f1"][0] == 0.5


def test_a_head_is_evaluated_on_its_own_model_alone(answerer: Answerer, head: FastRM, maps: Path) -> None:
    other = FastRM(replace(head.config, model_fingerprint="0" * 16))
    with pytest.raises(ModelMismatchError, match="0000000000000000"):
        evaluate_head(other, answerer, Items([open_maps(maps)]))
    with pytest.raises(ArgumentError, match="no answer to evaluate on"):
        evaluate_head(head, answerer, [])


# Answers


def test_live_answers_say_what_is_known_of_each(lvlm: tuple[Any, Any], answerer: Answerer, head: FastRM) -> None:
    source = open_source("scenes:held-out?count=6&kinds=color,relation,description")
    samples = [*source, replace(source[0], answer=f"  {source[0].answer}  ".upper()), replace(source[1], answer=None)]
    samples[2] = replace(samples[2], answer="nothing")
    steps: list[tuple[int, int]] = []
    found = list(live_answers(*lvlm, head, samples, batch=3, progress=lambda *step: steps.append(step)))
    assert steps == [(3, 8), (6, 8), (8, 8)]
    single = [next(live_answers(*lvlm, head, [sample], batch=1)) for sample in samples]
    for sample, many, one in zip(samples, found, single, strict=True):
        assert many.sample is sample and (many.answer, many.tokens, many.right) == (one.answer, one.tokens, one.right)
        assert many.entropy == pytest.approx(one.entropy, rel=1e-4)
        assert many.probability == pytest.approx(one.probability, rel=1e-3)
        np.testing.assert_allclose(many.image_map, one.image_map, rtol=0, atol=1e-4)

        tokens = many.tokens
        prompt = answerer.encode([sample.picture()], [sample.question])
        start = prompt["input_ids"].shape[1]
        (states,) = read_states(answerer, [sample], [tokens], [-1], 1)
        wanted = head.predict(states.hidden[-1][None], states.state[-1][None])
        with torch.no_grad():
            logits = lvlm[0](**answerer.join(prompt, [tokens])).logits[0, start - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        assert many.answer == answerer.decode(tokens)
        assert many.entropy == pytest.approx(float(wanted.entropy.mean()), rel=1e-4)
        assert many.probability == pytest.approx(float(chosen.mean().exp()), rel=1e-3)
        assert many.image_map.dtype == np.float32
        np.testing.assert_allclose(many.image_map.ravel(), wanted.map[0].mean(0).numpy(), rtol=0, atol=1e-4)
        assert many.region == (0, 0, *sample.picture().size)
    assert found[0].right is found[6].right is (found[0].answer == source[0].answer)
    assert found[2].right is False and found[7].right is None
    assert any(answer.right for answer in found)


def test_an_answer_of_no_token_is_never_trusted(
    lvlm: tuple[Any, Any], head: FastRM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self: Answerer, inputs: Any, most: int, streamer: Any = None) -> list[list[int]]:
        return [[] for _ in inputs["input_ids"]]

    monkeypatch.setattr(Answerer, "answer", silent)
    (answer,) = live_answers(*lvlm, head, open_source("scenes:held-out?count=1")[:1])
    assert isinstance(answer, LiveAnswer)
    assert (answer.answer, answer.right, answer.entropy, answer.probability) == ("", False, 1.0, 0.0)
    assert answer.image_map.shape == (12, 12) and not answer.image_map.any()


# The commands

SMALL = ("--epochs", "2", "--layer", "-1", "--dim", "8", "--batch", "8")


@pytest.fixture(scope="module")
def trained(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that the command has trained."""
    folder = tmp_path_factory.mktemp("trained") / "head"
    assert cli.main(["fastrm", "train", str(maps), "--out", str(folder), *SMALL]) == 0
    return folder


def test_build_train_evaluate(run: Run, lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    spec, other = (f"scenes:{split}?count=8&kinds=color,count" for split in ("train", "held-out"))
    code, out, _ = run("fastrm", "build-maps", spec, "--out", tmp_path / "maps", "--json")
    assert code == 0 and json.loads(out)["samples"] == 8
    assert run("fastrm", "build-maps", other, "--out", tmp_path / "a=b")[0] == 0

    code, out, err = run("fastrm", "train", tmp_path / "maps", "--out", tmp_path / "head", *SMALL, "--json")
    assert code == 0 and "epoch 1: loss" in err and "epoch 2:" in err
    said = json.loads(out)
    head = FastRM.from_pretrained(tmp_path / "head")
    head.check_model(lvlm[0])
    assert said["parameters"] == sum(parameter.numel() for parameter in head.parameters())
    assert said["decision_threshold"] == head.config.decision_threshold and said["epochs"] == 2
    assert (head.config.dim, head.config.method, head.config.model_name) == (8, "chefer", "the shipped LVLM")
    assert head.config.trained_on == (open_source(spec).spec,) and head.config.version == fx.__version__
    record = json.loads((tmp_path / "head" / "training.json").read_text())
    assert len(record["history"]) == 2 and record["settings"]["epochs"] == 2
    assert record["maps"][0]["source"] == open_source(spec).spec
    assert any((tmp_path / "head" / "log").glob("events*"))

    sets = (tmp_path / "maps", f"unseen={tmp_path / 'a=b'}", tmp_path / "a=b")
    code, out, err = run(
        *("fastrm", "evaluate", *sets, "--head", tmp_path / "head", "--out", tmp_path / "out", "--resamples", 20),
        "--json",
    )
    assert code == 0 and "fastrm.png" in err
    result = json.loads(out)
    assert list(result) == ["maps", "unseen", "a=b"]
    assert result["unseen"] == result["a=b"] and result["unseen"]["source"] == open_source(other).spec
    assert result == json.loads((tmp_path / "out" / "fastrm.json").read_text())
    assert set(result["maps"]["groups"]) == {"all", "color", "count"}
    assert set(result["maps"]["groups"]["all"]) == {"fastrm", "raw_attention", "mean_map", "exact"}
    assert (tmp_path / "out" / "fastrm.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "fastrm.md").read_text().splitlines()
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + 3 * 3 * 4
    value, low, high = result["unseen"]["groups"]["count"]["fastrm"]["f1"]
    assert any(line.startswith(f"| unseen | count | FastRM | {value:.3f} ({low:.3f} – {high:.3f}) |") for line in table)


def test_without_matplotlib_there_is_no_plot(
    run: Run, trained: Path, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("fastrm", "evaluate", maps, "--head", trained, "--out", tmp_path, "--resamples", 20)
    assert code == 0 and "pip install matplotlib" in err and not (tmp_path / "fastrm.png").exists()
    assert out == (tmp_path / "fastrm.md").read_text()


def test_training_on_decisions(run: Run, decisions: Path, maps: Path, tmp_path: Path) -> None:
    """What people have confirmed or corrected is explained, not what the model would say."""
    words = ("fastrm", "train", maps, decisions, "--out", tmp_path / "head", *SMALL, "--json")
    code, out, err = run(*words)
    assert code == 0 and json.loads(out)["epochs"] == 2, err
    (folder,) = (tmp_path / "head").glob("maps-*")
    built = open_maps(folder)
    assert built.answers == "reference" and built.source_spec == "decisions.jsonl"
    assert [record.answer for record in built] == [sample.answer for sample in open_source(str(decisions))]
    head = FastRM.from_pretrained(tmp_path / "head")
    assert head.config.trained_on == (open_source(SPEC).spec, "decisions.jsonl")
    record = json.loads((tmp_path / "head" / "training.json").read_text())
    assert [settings["samples"] for settings in record["maps"]] == [24, 8]
    # Their maps alone, as a set to evaluate on and to validate with: the file is asked for.
    assert "--source" in run("fastrm", "evaluate", folder, "--head", tmp_path / "head")[2]
    code, _, err = run(
        *("fastrm", "train", maps, "--validation", folder, "--source", decisions, "--out", tmp_path / "two", *SMALL)
    )
    assert code == 0, err


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of another model."""
    folder = tmp_path_factory.mktemp("elsewhere") / "other-lvlm"
    save_checkpoint(build_model(0), folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fastrm"], "COMMAND"),
        (["fastrm", "train"], "MAPS"),
        (["fastrm", "train", "{maps}"], "--out"),
        (["fastrm", "train", "{maps}", "--out", "{tmp}/head", "--epochs", "0"], "epochs: expected at least 1"),
        (["fastrm", "train", "{maps}", "--out", "{tmp}/head", "--layer", "4"], "layer: expected -4 … 3, got 4"),
        (["fastrm", "train", "{maps}", "--out", "{tmp}/head", "--norm", "batch"], "--norm"),
        (["fastrm", "train", "{maps}", "--out", "{tmp}/head", "--binarisation", "1"], "binarisation: expected"),
        (["fastrm", "train", "{maps}", "--out", "{tmp}/head", "--device", "abacus"], "--device"),
        (["fastrm", "train", "{tmp}/gone", "--out", "{tmp}/head"], "folder of build-maps"),
        (["fastrm", "train", "{maps}", "--validation", "{tmp}/gone", "--out", "{tmp}/head"], "holds no maps"),
        (["fastrm", "train", "{maps}", "--out", "{maps}/index.json"], "cannot write"),
        (["fastrm", "train", "{maps}", "--model", "{other}", "--out", "{tmp}/head"], "holds maps of the shipped LVLM"),
        (["fastrm", "train", "{maps}", "--source", "{tmp}/gone", "--out", "{tmp}/head"], "source: there is no"),
        (["fastrm", "evaluate", "{tmp}/gone", "--head", "{head}"], "holds no maps"),
        (["fastrm", "evaluate", "{maps}", "--head", "{tmp}"], "holds no FastRM head"),
        (["fastrm", "evaluate", "{maps}", "{maps}", "--head", "{head}"], "two sets are called 'maps'"),
        (["fastrm", "evaluate", "{maps}", "--head", "{head}", "--model", "{other}"], "trained for the shipped LVLM"),
        (["fastrm", "evaluate", "{maps}", "--head", "{head}", "--resamples", "0"], "--resamples: expected"),
    ],
)
def test_bad_input_ends_with_one_line(
    run: Run, maps: Path, trained: Path, elsewhere: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    if words[1:2] == ["evaluate"]:
        words = [*words, "--out", "{tmp}/out"]
    code, out, err = run(*(word.format(maps=maps, tmp=tmp_path, head=trained, other=elsewhere) for word in words))
    assert code == 2 and not out
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("lvlm-fastxai: error: ") and message in line


def test_maps_of_two_methods_are_not_mixed(run: Run, lvlm: tuple[Any, Any], maps: Path, tmp_path: Path) -> None:
    source = open_source("scenes:train?count=2")
    build_maps(*lvlm, source, tmp_path / "other", method="lvlm_interpret")
    code, _, err = run("fastrm", "train", maps, tmp_path / "other", "--out", tmp_path / "head")
    assert code == 2 and "chefer and lvlm_interpret; a head predicts one method's" in err
    one = tmp_path / "one"
    build_maps(*lvlm, open_source("scenes:train?count=1"), one)
    code, _, err = run("fastrm", "train", one, "--out", tmp_path / "head")
    assert code == 2 and "too few samples" in err


@pytest.mark.parametrize("command", ["build-maps", "train", "evaluate"])
def test_help_loads_no_torch(command: str) -> None:
    script = (
        "import sys; from lvlm_fastxai.cli import main\n"
        f"try: main(['fastrm', '{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'accelerate', 'sklearn'} & set(sys.modules)"
    )

    def seconds() -> float:
        """Of processor time, which other programs on the machine do not lengthen."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "example: " in result.stdout and "fastrm " + command in result.stdout
    assert seconds() - before < 1


@pytest.mark.timeout(300)
def test_two_processes_train_one_head(maps: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lvlm_fastxai.cli"]
    words = ["fastrm", "train", str(maps), "--out", str(tmp_path), *SMALL, "--json", "--query-width", "6"]
    words += ["--norm", "rms", "--activation", "softmax"]
    result = subprocess.run(
        [sys.executable, *launch, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)  # of one process, and nothing else
    assert result.stderr.count("epoch 2: loss") == 1
    head = FastRM.from_pretrained(tmp_path)
    assert (head.config.norm, head.config.activation, head.config.query_width) == ("rms", "softmax", 6)
    # Both processes' share of the validation maps makes the figure that one process finds for the same head.
    answerer = Answerer(*fx.load_tiny_lvlm())
    validation = Items([open_maps(maps)])[22:]
    cache = StateCache(answerer, validation, [-1], 1e9)
    f1, threshold = train._best_threshold(train._count(head, cache, head.config, 8, "cpu"))
    assert f1 == pytest.approx(said["validation_f1"]) and threshold == said["decision_threshold"]


def test_the_shipped_head(lvlm: tuple[Any, Any], answerer: Answerer, tmp_path: Path) -> None:
    """It fits the shipped model, and its maps are worth more than the baseline without eyes, on scenes held out."""
    from lvlm_fastxai.fastrm.head import SHIPPED

    shipped = FastRM.from_pretrained("shipped")
    shipped.check_model(lvlm[0])
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 1_000_000
    training = json.loads((SHIPPED / "training.json").read_text())
    assert training["maps"][0]["model_fingerprint"] == shipped.config.model_fingerprint
    # The defaults are the settings that it was trained with.
    assert TrainSettings(**training["settings"]) == TrainSettings()
    assert all("relation" not in source and "position" not in source for source in shipped.config.trained_on)
    build_maps(*lvlm, open_source("scenes:held-out?count=24&seed=900&kinds=color,shape,texture"), tmp_path / "maps")
    found = evaluate_head(shipped, answerer, Items([open_maps(tmp_path / "maps")]), resamples=200)["groups"]["all"]
    # Measured on 600 of these kinds: docs/fastrm.md.
    assert found["fastrm"]["f1"][0] > 0.35 > found["mean_map"]["best_f1"][0]
