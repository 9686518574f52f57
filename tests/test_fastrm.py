"""The FastRM head against its formula, its files, and its maps while generate() runs, on every family."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import (
    ANSWER,
    IMAGE,
    SEQUENCE_KEYS,
    VIDEO,
    VISION_NAMES,
    Inputs,
    join,
    make_model,
    make_sample,
    picture,
)
from support.rows import NoSquare
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from lvlm_fastxai import Explainer, cli, families
from lvlm_fastxai.errors import ArgumentError, ModelMismatchError
from lvlm_fastxai.fastrm import FastRM, FastRMConfig, LiveMaps, LiveStep, stream
from lvlm_fastxai.fastrm import live as live_module
from lvlm_fastxai.fastrm.head import min_max
from lvlm_fastxai.methods import GlimpseOptions
from lvlm_fastxai.models.checkpoint import load_checkpoint
from lvlm_fastxai.models.decoder import find_decoder_layers
from lvlm_fastxai.models.fingerprint import fingerprint
from lvlm_fastxai.prompting.answering import Answerer
from lvlm_fastxai.prompting.inputs import accepted
from lvlm_fastxai.prompting.joining import join as join_answers
from lvlm_fastxai.tiny.model import build_model, build_processor, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 5
QUESTION = "what color is the small circle?"
# Markers in an answer would ask, in the teacher-forced pass, for pictures that are not there.
SETTINGS: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": [VIDEO, IMAGE]}
FORMS = [
    (norm, activation, width) for norm in ("rms", "layer") for activation in ("sigmoid", "softmax") for width in (0, 5)
]

floor = pytest.mark.skipif(
    version("transformers") == "5.0.0", reason="fails in transformers itself, without a streamer too"
)


def make_head(model: Any = None, *, seed: int = 0, hidden_size: int = 32, **settings: Any) -> FastRM:
    """A head with every weight drawn, of the model or of none."""
    if model is not None:
        settings = {"model_fingerprint": fingerprint(model), "model_name": "a tiny LVLM", **settings}
        hidden_size = model.config.get_text_config().hidden_size
    plain = {"dim": 7, "layer": -1, "norm": "rms", "query_width": 0}
    head = FastRM(FastRMConfig(hidden_size=hidden_size, **{**plain, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * drawn if name == "norm_weight" else 0.5 * drawn)
    return head


# The head


def formula(head: FastRM, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, its entropy and its mean Bernoulli entropy of one sample, (S, D) and (N, D), as the paper writes them."""
    weights = {name: value.double() for name, value in head.state_dict().items()}
    hidden, state = hidden.double(), state.double()

    def norm(x: Tensor) -> Tensor:
        if head.config.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + head.config.eps).sqrt() * weights["norm_weight"]
        return x + weights["norm_bias"] if head.config.norm == "layer" else x

    u = norm(state)
    if head.config.query_width:
        u = u @ weights["query_layer.weight"].T + weights["query_layer.bias"]
        u = u * (1 + torch.erf(u / math.sqrt(2))) / 2
    q = u @ weights["query.weight"].T + weights.get("query.bias", torch.tensor(0.0))
    s = q @ (norm(hidden) @ weights["key.weight"].T).T / math.sqrt(head.config.dim) + weights["bias"]
    m = 1 / (1 + (-s).exp()) if head.config.activation == "sigmoid" else s.exp() / s.exp().sum(-1, keepdim=True)
    p = m / m.sum(-1, keepdim=True)
    entropy = -(p * p.log()).sum(-1) / math.log(p.shape[-1])
    return m, entropy, -(m * m.log2() + (1 - m) * (1 - m).log2()).mean(-1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("norm", "activation", "width"), FORMS)
def test_folded_and_unfolded_are_the_formula(
    norm: str, activation: str, width: int, dtype: torch.dtype, error: float
) -> None:
    head = make_head(norm=norm, activation=activation, query_width=width).to(dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = (3 * torch.randn(2, 9, 32, generator=generator) + 1).to(dtype)
    state = (3 * torch.randn(2, 4, 32, generator=generator) - 1).to(dtype)
    hidden[1, 6:] = torch.nan
    found = head.predict(hidden, state, lengths=torch.tensor([9, 6]))
    for sample, length in enumerate((9, 6)):
        wanted = formula(head, hidden[sample, :length], state[sample])
        unfolded = head(hidden[sample, None, :length], state[sample, None])[0]
        unfolded = unfolded.sigmoid() if activation == "sigmoid" else unfolded.softmax(-1)
        torch.testing.assert_close(unfolded.double(), wanted[0], rtol=0, atol=error)
        assert found.map.dtype == dtype and not found.map[sample, :, length:].any()
        torch.testing.assert_close(found.map[sample, :, :length].double(), wanted[0], rtol=0, atol=error)
        torch.testing.assert_close(found.entropy[sample].double(), wanted[1], rtol=0, atol=error)
        torch.testing.assert_close(found.bernoulli[sample].double(), wanted[2], rtol=0, atol=error)


def test_positive_columns() -> None:
    relevancy = torch.tensor([[0.1, 0.3, 0.5, 0.2]])
    assert make_head(decision_threshold=0.2).positive(relevancy).tolist() == [[False, True, True, False]]
    relative = make_head(activation="softmax", decision_threshold=0.4)  # of 0, 0.5, 1, 0.25
    assert relative.positive(relevancy).tolist() == [[False, True, True, False]]
    assert not relative.positive(torch.ones(1, 4)).any()
    assert min_max(relevancy).tolist() == [pytest.approx([0, 0.5, 1, 0.25])]


def test_states_of_another_width_are_refused() -> None:
    head = make_head()
    for hidden, state in ((32, 31), (31, 32)):
        with pytest.raises(ArgumentError, match="reads states of width 32, got"):
            head.predict(torch.zeros(1, 4, hidden), torch.zeros(1, 1, state))


def test_a_prediction_makes_no_graph_and_nothing_quadratic() -> None:
    length = 420
    hidden, state = torch.randn(1, length, 32, requires_grad=True), torch.randn(1, 3, 32, requires_grad=True)
    for norm, activation, width in FORMS:
        head = make_head(norm=norm, activation=activation, query_width=width)
        with NoSquare(length) as guard:
            found = head.predict(hidden, state)
        assert guard.calls
        assert not any(part.requires_grad for part in found)
        assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"query_width": -1}, "query_width: expected at least 0, got -1"),
        ({"norm": "batch"}, "norm: expected one of rms, layer, got 'batch'"),
        ({"activation": "relu"}, "activation: expected one of sigmoid, softmax, got 'relu'"),
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
        ({"binarisation": 1.0}, "binarisation: expected a number between 0 and 1, got 1.0"),
        ({"decision_threshold": math.nan}, "decision_threshold: expected a number between 0 and 1, got nan"),
    ],
)
def test_a_bad_configuration(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        FastRMConfig(**{"hidden_size": 8, **settings})
    assert str(caught.value) == message


# Files


@pytest.mark.parametrize(("norm", "activation", "width"), FORMS)
def test_a_saved_head_is_read_back(tmp_path: Path, norm: str, activation: str, width: int) -> None:
    head = make_head(norm=norm, activation=activation, query_width=width, trained_on=("a.jsonl", "b"), model_name="ä")
    head.mean_map = torch.rand(12)
    head.save_pretrained(tmp_path / "new" / "head")
    found = FastRM.from_pretrained(tmp_path / "new" / "head")
    assert found.config == head.config and not found.training
    own, read = head.state_dict(), found.state_dict()
    assert own.keys() == read.keys()
    assert all(own[name].numpy().tobytes() == read[name].numpy().tobytes() for name in own)
    assert found.fingerprint == head.fingerprint != make_head(seed=1).fingerprint


def test_a_head_without_a_mean_map(tmp_path: Path) -> None:
    make_head().save_pretrained(tmp_path)
    assert FastRM.from_pretrained(str(tmp_path)).mean_map.shape == (0,)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(change(values)), encoding="utf-8")

    return damage


def signed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Settings that do not fit the weights, with a checksum that fits both."""

    def damage(folder: Path) -> None:
        changed("fastrm.json", change)(folder)
        path = folder / "fastrm.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["sha256"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        digest.update((folder / "fastrm.safetensors").read_bytes())
        path.write_text(json.dumps({**values, "sha256": digest.hexdigest()}), encoding="utf-8")

    return damage


def one_bit(name: str, place: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 4
        (folder / name).write_bytes(data)

    return damage


def cut(folder: Path) -> None:
    path = folder / "fastrm.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def other_weights(folder: Path) -> None:
    make_head(hidden_size=16).save_pretrained(folder / "other")
    (folder / "other" / "fastrm.safetensors").replace(folder / "fastrm.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("fastrm.json", lambda v: v | {"schema": "lvlm-fastxai/fastrm/9"}), "schema is not lvlm-fastxai/fastr"),
        (changed("fastrm.json", lambda v: v | {"colour": 1}), "unknown settings colour"),
        (changed("fastrm.json", lambda v: [v]), "cannot load"),
        (changed("fastrm.json", lambda v: {k: x for k, x in v.items() if k != "hidden_size"}), "hidden_size"),
        (changed("fastrm.json", lambda v: v | {"dim": "many"}), "cannot load"),
        (changed("fastrm.json", lambda v: v | {"dim": 0}), "dim: expected at least 1"),
        (changed("fastrm.json", lambda v: v | {"schema": "lvlm-fastxai/fastrm/1"}), "earlier version.*train it again"),
        (changed("fastrm.json", lambda v: v | {"norm": "layer"}), "not as they were written together"),
        (changed("fastrm.json", lambda v: v | {"decision_threshold": 0.51}), "not as they were written together"),
        (changed("fastrm.json", lambda v: {k: x for k, x in v.items() if k != "sha256"}), "not as they were written"),
        (one_bit("fastrm.safetensors", -2), "not as they were written together"),
        (signed(lambda v: v | {"norm": "layer"}), "norm_bias"),
        (signed(lambda v: v | {"hidden_size": 16}), "size mismatch"),
        (lambda folder: (folder / "fastrm.json").write_text("{"), "cannot load"),
        (lambda folder: (folder / "fastrm.json").unlink(), "holds no FastRM head"),
        (lambda folder: (folder / "fastrm.safetensors").unlink(), "fastrm.safetensors"),
        (cut, "cannot load"),
        (other_weights, "not as they were written together"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    make_head().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArgumentError, match=message) as caught:
        FastRM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and (str(tmp_path) in str(caught.value) or "expected" in message)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"holds no FastRM head.*fastrm train"):
        FastRM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot write"):
        make_head().save_pretrained(tmp_path / "file" / "head")
    (tmp_path / "taken" / "fastrm.safetensors").mkdir(parents=True)
    with pytest.raises(ArgumentError, match="cannot write"):
        make_head().save_pretrained(tmp_path / "taken")


def test_a_head_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after any number of files."""
    make_head().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sync = os.fsync
    for fine in range(4):
        left = iter([None] * fine)

        def full(descriptor: int, left: Any = left) -> None:
            if next(left, descriptor) is not None:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ArgumentError, match="disk full") as caught:
            make_head(seed=1).save_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        if fine < 3:
            assert found == before
    monkeypatch.undo()
    FastRM.from_pretrained(tmp_path)


def test_a_head_whose_writer_was_killed_between_its_files_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_head().save_pretrained(tmp_path)
    replace = os.replace

    def killed(source: Any, place: Any) -> None:
        if str(place).endswith("fastrm.safetensors"):
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make_head(seed=1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert FastRM.from_pretrained(tmp_path).fingerprint == make_head(seed=1).fingerprint


# The model that a head belongs to


def test_a_head_knows_its_model() -> None:
    model = make_model("llava", torch.float32)
    own = fingerprint(model)
    head = make_head(model)
    head.check_model(model)
    head.check_model(make_model("llava", torch.bfloat16))
    other = make_model("llava", torch.float32, seed=1)
    with pytest.raises(ModelMismatchError) as caught:
        head.check_model(other)
    assert own in str(caught.value) and fingerprint(other) in str(caught.value) and "a tiny LVLM" in str(caught.value)
    with pytest.raises(ModelMismatchError, match="width 16, this model's have 32"):
        make_head(hidden_size=16).check_model(model)
    with pytest.raises(ModelMismatchError, match="not recorded"):
        make_head().check_model(model)
    with pytest.raises(ModelMismatchError, match=r"d9a481790bdcac4c of an earlier version.*fastrm train"):
        make_head(model, model_fingerprint="d9a481790bdcac4c").check_model(model)
    for refusing in (
        lambda: LiveMaps(head, other, {"input_ids": torch.tensor([[IMAGE]])}),
        lambda: next(stream(head, other, {"input_ids": torch.tensor([[IMAGE]])})),
        lambda: Explainer(build_model(0), build_processor(), head=head),
    ):
        with pytest.raises(ModelMismatchError):
            refusing()


# Maps while generate() runs


def make_prompt(name: str, model: nn.Module, *, seed: int = 0, text: int = 12, **sample: Any) -> Inputs:
    inputs = make_sample(name, model, seed=seed, text=text, **sample)
    return {key: value[:, :-ANSWER] if key in SEQUENCE_KEYS else value for key, value in inputs.items()}


def padded(name: str, prompts: list[Inputs]) -> Inputs:
    joined = join(name, prompts, "left")
    return {key: value for key, value in joined.items() if key != "position_ids"}  # generate() counts them itself


def warm(name: str) -> tuple[Any, Inputs, FastRM]:
    """Model, prompt and head; transformers has hung its own hooks on the tower, as it does in the first forward."""
    model = make_model(name)
    prompt = make_prompt(name, model)
    model.generate(**prompt, **{**SETTINGS, "max_new_tokens": 1})
    return model, prompt, make_head(model).double()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def expected(head: FastRM, model: Any, prompt: Inputs, answer: list[int]) -> tuple[Any, Tensor]:
    """Prediction of the answer's tokens from one teacher-forced pass over one prompt, and the (T, V) logits."""
    start = prompt["input_ids"].shape[1]
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = find_decoder_layers(model)[1][head.config.layer].register_forward_hook(see)
    with torch.no_grad():
        logits = model(**accepted(model, join_answers(model.config, prompt, [answer]))).logits
    handle.remove()
    columns = (prompt["input_ids"][0] == IMAGE).nonzero()[:, 0]
    rows = slice(start - 1, start - 1 + len(answer))
    return head.predict(seen[0][:, columns], seen[0][:, rows]), logits[0, rows]


def compare(head: FastRM, model: Any, prompt: Inputs, steps: list[LiveStep], row: int, error: float = 1e-9) -> None:
    """One answer's live maps against those of a pass over its prompt alone."""
    tokens = [int(step.token_ids[row]) for step in steps]
    wanted, logits = expected(head, model, prompt, tokens)
    columns = (prompt["input_ids"][0] == IMAGE).nonzero()[:, 0]
    layouts = families.image_layouts(model.config, prompt)
    for place, (step, token) in enumerate(zip(steps, tokens, strict=True)):
        n = len(columns)
        torch.testing.assert_close(step.prediction.map[row, 0, :n], wanted.map[0, place], rtol=0, atol=error)
        assert not step.prediction.map[row, 0, n:].any()
        found = step.token(row)
        assert found.token_id == token
        assert found.entropy == step.entropy(row) == pytest.approx(float(wanted.entropy[0, place]), abs=error)
        assert found.bernoulli == pytest.approx(float(wanted.bernoulli[0, place]), abs=error)
        assert found.logit == pytest.approx(float(logits[place, token]), rel=1e-5, abs=1e-5)
        assert found.probability == pytest.approx(float(logits[place].softmax(-1)[token]), rel=1e-5)
        line = torch.zeros(prompt["input_ids"].shape[1])
        line[columns] = wanted.map[0, place].float()
        assert len(found.image_maps) == len(layouts)
        for image_map, layout in zip(found.image_maps, layouts, strict=True):
            assert image_map.dtype == np.float32
            np.testing.assert_allclose(image_map, layout.read(line).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", VISION_NAMES)
def test_live_maps_are_those_of_a_teacher_forced_pass(name: str) -> None:
    model = make_model(name)
    prompt = make_prompt(name, model)
    head = make_head(model, layer=-2 if name == "llava" else -1).double()
    alone = model.generate(**prompt, **SETTINGS)
    before = hooks(model)
    with LiveMaps(head, model, prompt) as live:
        output = model.generate(**prompt, **SETTINGS, streamer=live)
        assert hooks(model) == before + 2
    assert hooks(model) == before
    assert torch.equal(output, alone)
    start = prompt["input_ids"].shape[1]
    assert [int(step.token_ids[0]) for step in live.steps] == output[0, start:].tolist()
    assert [step.index for step in live.steps] == list(range(TOKENS))
    compare(head, model, prompt, live.steps, 0)


@pytest.mark.parametrize("name", VISION_NAMES)
def test_live_columns_are_those_that_heads_are_trained_on(name: str) -> None:
    model = make_model(name, torch.float32)
    prompt = make_prompt(name, model)
    live = LiveMaps(make_head(model), model, prompt)
    assert live.columns().tolist() == Answerer.image_columns(SimpleNamespace(model=model), prompt, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
def test_a_padded_batch_sampled_with_several_answers_each(name: str) -> None:
    """Pictures of different sizes, prompts of different lengths, two answers to each."""
    model = make_model(name)
    head = make_head(model, norm="layer").double()
    prompts = [
        make_prompt(name, model, seed=seed, text=text, images=[picture(size, seed)])
        for seed, text, size in ((0, 12, (20, 50)), (1, 4, (16, 16)))
    ]
    counts = [int((prompt["input_ids"] == IMAGE).sum()) for prompt in prompts]
    assert counts[0] != counts[1]
    inputs = padded(name, prompts)
    settings = {**SETTINGS, "do_sample": True, "temperature": 3.0, "top_k": 20, "num_return_sequences": 2}
    torch.manual_seed(7)
    alone = model.generate(**inputs, **settings)
    torch.manual_seed(7)
    with LiveMaps(head, model, inputs) as live:
        output = model.generate(**inputs, **settings, streamer=live)
    assert torch.equal(output, alone)
    answers = torch.stack([step.token_ids for step in live.steps], 1)
    assert torch.equal(answers, output[:, inputs["input_ids"].shape[1] :])
    assert len({tuple(answer) for answer in answers.tolist()}) == 4
    for row in range(4):
        assert len(live.columns(row)) == counts[row // 2]
        compare(head, model, prompts[row // 2], live.steps, row)


@floor
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_a_prompt_that_is_read_in_pieces(name: str, size: int) -> None:
    """Pieces of one prompt; gemma3's columns of a picture see each other, so its own states differ then."""
    model = make_model(name)
    prompts = [make_prompt(name, model, seed=seed, text=text) for seed, text in ((0, 12), (1, 7))]
    inputs, head = padded(name, prompts), make_head(model).double()
    length = inputs["input_ids"].shape[1]
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    find_decoder_layers(model)[1][-1].register_forward_hook(see)
    with LiveMaps(head, model, inputs) as live:
        model.generate(**inputs, **SETTINGS, prefill_chunk_size=size, streamer=live)
    assert len(seen) == -(-length // size) + TOKENS - 1 and len(live.steps) == TOKENS
    hidden = torch.cat(seen, 1)
    for row in range(2):
        wanted = head.predict(hidden[row, None, live.columns(row)], hidden[row, None, length - 1 :])
        found = torch.stack([step.prediction.map[row, 0, : len(live.columns(row))] for step in live.steps])
        torch.testing.assert_close(found, wanted.map[0], rtol=0, atol=1e-9)
        if name != "gemma3":
            compare(head, model, prompts[row], live.steps, row)


def test_states_are_kept_once_in_the_models_dtype() -> None:
    model = make_model("llava", torch.bfloat16)
    prompt = make_prompt("llava", model)
    columns = int((prompt["input_ids"] == IMAGE).sum())
    seen: list[tuple[int, torch.dtype, int]] = []

    def look(step: LiveStep) -> None:
        assert live._states is not None
        seen.append((live._states.data_ptr(), live._states.dtype, live.state_bytes))

    with LiveMaps(make_head(model), model, prompt, on_step=look) as live:
        model.generate(**prompt, **SETTINGS, streamer=live)
    assert len(seen) == TOKENS and len(set(seen)) == 1
    assert seen[0][1:] == (torch.bfloat16, columns * 32 * 2)
    assert live.steps == [] and live.state_bytes == 0


class Guarded(LiveMaps):
    """Live maps that may make nothing with two dimensions of the sequence's length."""

    calls = 0

    def _see_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        with NoSquare(self.prompt_length) as guard:
            super()._see_layer(module, args, output)
        self.calls += guard.calls

    def put(self, value: Tensor) -> None:
        with NoSquare(self.prompt_length) as guard:
            super().put(value)
        self.calls += guard.calls


def test_live_maps_make_no_graph_and_nothing_quadratic() -> None:
    model = make_model("llava", torch.float32, layers=1)
    prompt = make_prompt("llava", model, text=400)
    head = make_head(model)
    with Guarded(head, model, prompt) as live:
        model.generate(**prompt, **SETTINGS, streamer=live)
    assert live.calls > TOKENS and len(live.steps) == TOKENS
    assert not any(step.prediction.map.requires_grad or step.probabilities.requires_grad for step in live.steps)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *head.parameters()))


def test_an_answer_that_has_ended() -> None:
    """The end token belongs to its answer, what fills the row up behind it does not."""
    model = make_model("llava")
    prompts = [make_prompt("llava", model, seed=seed) for seed in (0, 1)]
    inputs = padded("llava", prompts)
    free = model.generate(**inputs, **SETTINGS)[:, inputs["input_ids"].shape[1] :].tolist()
    last, end = next((place, token) for place, token in enumerate(free[0]) if token not in (*free[0][:place], *free[1]))
    assert last < TOKENS - 1
    model.generation_config.eos_token_id = [end, 88]
    with LiveMaps(make_head(model).double(), model, inputs) as live:
        model.generate(**inputs, **SETTINGS, streamer=live)
    count = last + 1
    assert [list(step.open) for step in live.steps] == [[True, True]] * count + [[False, True]] * (TOKENS - count)
    assert [int(step.token_ids[0]) for step in live.steps[:count]] == free[0][:count]


class Call(LogitsProcessor):
    """Calls back with the number of tokens so far before each token is chosen."""

    def __init__(self, prompt: Inputs, work: Callable[[int], None]) -> None:
        self.start, self.work = prompt["input_ids"].shape[1], work

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.work(input_ids.shape[1] - self.start)
        return scores


def broken(step: int) -> None:
    if step == 2:
        raise RuntimeError("no more ink")


def test_an_error_leaves_no_hook_and_a_second_run_begins_anew() -> None:
    model, prompt, head = warm("llava")
    live = LiveMaps(head, model, prompt)
    before = hooks(model)
    with pytest.raises(RuntimeError, match="no more ink"), live:
        model.generate(
            **prompt, **SETTINGS, streamer=live, logits_processor=LogitsProcessorList([Call(prompt, broken)])
        )
    assert hooks(model) == before and len(live.steps) == 2
    with live:
        model.generate(**prompt, **SETTINGS, streamer=live)
    assert hooks(model) == before and [step.index for step in live.steps] == list(range(TOKENS))
    compare(head, model, prompt, live.steps, 0)


def test_an_interrupt_at_any_line_leaves_no_hook() -> None:
    """Raised at each line in turn that runs while the hooks come and go."""
    model, prompt, head = warm("llava")
    before = hooks(model)
    live = LiveMaps(head, model, prompt)
    watched = {"__enter__", "_detach"}
    interrupted = 0

    def run(place: int) -> None:
        left = place

        def trace(frame: Any, event: str, value: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != live_module.__file__ or frame.f_code.co_name not in watched:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with live:
                pass
        finally:
            sys.settrace(None)

    for place in range(1, 60):
        try:
            run(place)
        except KeyboardInterrupt:
            interrupted += 1
        assert hooks(model) == before, place
    assert 10 < interrupted < 59  # every line has had its turn


def test_a_stream_whose_reader_fails_leaves_no_thread() -> None:
    model, prompt, head = warm("llava")
    before, threads = hooks(model), set(threading.enumerate())

    def read() -> None:
        for _ in stream(head, model, prompt, **{**SETTINGS, "max_new_tokens": 300}):
            raise RuntimeError("nobody reads on")

    with pytest.raises(RuntimeError, match="nobody reads on") as caught:
        read()
    caught.value.__traceback__ = None
    del caught
    assert set(threading.enumerate()) == threads and hooks(model) == before


def test_live_maps_are_refused_where_there_are_none() -> None:
    model = make_model("llava")
    prompt, head = make_prompt("llava", model), make_head(model)
    with pytest.raises(ArgumentError, match="sample 0 has no image token"):
        LiveMaps(head, model, {"input_ids": torch.tensor([[3, 4]])})
    for inputs in ({}, {"input_ids": [[IMAGE]]}, {"input_ids": torch.tensor([IMAGE])}):
        with pytest.raises(ArgumentError, match="'input_ids'"):
            LiveMaps(head, model, inputs)
    with pytest.raises(ArgumentError, match="layer: the head reads layer 3 of a model with 3"):
        LiveMaps(make_head(model, layer=3), model, prompt)
    with pytest.raises(ArgumentError, match="use it as `with LiveMaps"):
        model.generate(**prompt, **SETTINGS, streamer=LiveMaps(head, model, prompt))
    two = padded("llava", [prompt, make_prompt("llava", model, seed=1), make_prompt("llava", model, seed=2)])
    first = {key: value[:2] for key, value in two.items()}
    with (
        pytest.raises(ArgumentError, match="runs 3 sequences, LiveMaps was given 2"),
        LiveMaps(head, model, first) as live,
    ):
        model.generate(**two, **SETTINGS, streamer=live)


@pytest.mark.parametrize(
    "option", [pytest.param({"prompt_lookup_num_tokens": 3}, marks=floor), {"guidance_scale": 1.5}]
)
def test_passes_that_choose_no_token_or_several_are_refused(option: dict[str, Any]) -> None:
    model, prompt, head = warm("llava")
    live = LiveMaps(head, model, prompt)
    with pytest.raises(ArgumentError, match=r"several tokens for one.*leave these out"), live:
        model.generate(**prompt, **SETTINGS, **option, streamer=live)
    if live.steps:  # prompt lookup has found nothing for the first
        compare(head, model, prompt, live.steps, 0)


@pytest.mark.parametrize("option", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_whatever_the_cache(option: dict[str, Any]) -> None:
    model, prompt, head = warm("llava")
    with LiveMaps(head, model, prompt) as live:
        model.generate(**prompt, **SETTINGS, **option, streamer=live)
    compare(head, model, prompt, live.steps, 0)


# Maps as they come


@pytest.mark.timeout(120)
def test_a_stream_gives_each_step_when_it_is_there() -> None:
    model, prompt, head = warm("llava")
    before = hooks(model)
    seen = threading.Event()

    def wait(step: int) -> None:
        assert step == 0 or seen.wait(60), "the first step was not handed over before the second was computed"

    steps = stream(head, model, prompt, **SETTINGS, logits_processor=LogitsProcessorList([Call(prompt, wait)]))
    first = next(steps)
    assert first.index == 0 and not seen.is_set()
    seen.set()
    rest = list(steps)
    assert hooks(model) == before
    compare(head, model, prompt, [first, *rest], 0)
    assert len(rest) == TOKENS - 1 and not first.prediction.map.requires_grad


@pytest.mark.timeout(120)
def test_a_stream_that_nobody_reads_on_stops() -> None:
    model, prompt, head = warm("llava")
    before = hooks(model)
    threads = set(threading.enumerate())
    asked: list[int] = []
    read = threading.Event()

    def watch(step: int) -> None:
        assert step == 0 or read.wait(60)
        asked.append(step)

    steps = stream(
        *(head, model, prompt),
        **{**SETTINGS, "max_new_tokens": 500},
        logits_processor=LogitsProcessorList([Call(prompt, watch)]),
    )
    next(steps)
    read.set()
    steps.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) == threads and hooks(model) == before
    assert len(asked) < 400


def test_a_streams_errors_are_the_readers() -> None:
    model, prompt, head = warm("llava")
    before = hooks(model)
    threads = set(threading.enumerate())
    steps = stream(head, model, prompt, **SETTINGS, logits_processor=LogitsProcessorList([Call(prompt, broken)]))
    got = [next(steps), next(steps)]
    with pytest.raises(RuntimeError, match="no more ink"):
        next(steps)
    assert [step.index for step in got] == [0, 1]
    assert set(threading.enumerate()) == threads and hooks(model) == before


# In the explainer


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return build_model(0), build_processor()


def test_the_explainer_shows_predicted_maps(lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = lvlm
    head = make_head(model)
    image = picture((64, 96))
    explanation = Explainer(model, processor, method="fastrm", head=head)(image, QUESTION, max_new_tokens=4)
    exact = Explainer(model, processor)(image, QUESTION, max_new_tokens=4)
    assert explanation.answer == exact.answer and len(explanation.tokens) == len(exact.tokens) > 1
    answerer = Answerer(model, processor)
    prompt = answerer.encode([image], [QUESTION])
    tokens = [token.token_id for token in exact.tokens]
    found = LiveMaps(head, model, prompt)
    with found:
        assert answerer.answer(prompt, 4, streamer=found)[0] == tokens
    for token, other, step in zip(explanation.tokens, exact.tokens, found.steps, strict=True):
        np.testing.assert_allclose(token.image_map, step.token().image_maps[0], rtol=1e-5)
        assert token.token_id == other.token_id and token.position == other.position
        assert token.probability == pytest.approx(other.probability, rel=1e-4)
        assert token.entropy == pytest.approx(step.entropy(), rel=1e-5) and 0 < token.entropy < 1
        assert not token.prompt_scores.any() and token.shares["image"] == pytest.approx(float(token.image_map.sum()))
    assert explanation.entropy == pytest.approx(np.mean([token.entropy for token in explanation.tokens]))
    assert explanation.method == "fastrm" and explanation.backend in ("cpu", "reference")
    assert any("maps the image alone" in note for note in explanation.notes)
    written = json.loads(json.dumps(explanation.to_dict()))
    assert written["method"] == "fastrm" and [token["entropy"] for token in written["tokens"]] == [
        token.entropy for token in explanation.tokens
    ]
    paths = explanation.save(tmp_path)
    assert "fastrm" in paths["report"].read_text(encoding="utf-8")
    assert "<html" in explanation._repr_html_() or "&lt;html" in explanation._repr_html_()


def test_some_tokens_alone(lvlm: tuple[Any, Any]) -> None:
    model, processor = lvlm
    head = make_head(model)
    whole = Explainer(model, processor, method="fastrm", head=head)(picture((64, 96)), QUESTION, max_new_tokens=5)
    part = Explainer(model, processor, method="fastrm", head=head, tokens="top:1")(
        picture((64, 96)), QUESTION, max_new_tokens=5
    )
    assert len(part.tokens) == 1 and part.untouched
    (same,) = [token for token in whole.tokens if token.position == part.tokens[0].position]
    np.testing.assert_array_equal(part.tokens[0].image_map, same.image_map)
    assert part.tokens[0].entropy == same.entropy


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_head_gives_entropies_beside_exact_maps(lvlm: tuple[Any, Any], memory: str) -> None:
    model, processor = lvlm
    head = make_head(model)
    image = picture((64, 96))
    plain = Explainer(model, processor, memory=memory)(image, QUESTION, max_new_tokens=3)
    found = Explainer(model, processor, memory=memory, head=head)(image, QUESTION, max_new_tokens=3)
    predicted = Explainer(model, processor, method="fastrm", head=head)(image, QUESTION, max_new_tokens=3)
    assert plain.entropy is None and plain.tokens[0].entropy is None
    for own, other, proxy in zip(found.tokens, plain.tokens, predicted.tokens, strict=True):
        np.testing.assert_array_equal(own.image_map, other.image_map)
        assert own.entropy == proxy.entropy
    assert found.entropy == predicted.entropy and found.notes == plain.notes


def test_an_estimate_counts_no_sweep(lvlm: tuple[Any, Any]) -> None:
    model, processor = lvlm
    image = picture((64, 96))
    proxy = Explainer(model, processor, method="fastrm", head=make_head(model)).estimate(image, QUESTION)
    exact = Explainer(model, processor).estimate(image, QUESTION)
    assert 0 < proxy.seconds < exact.seconds


def test_the_explainer_refuses_what_does_not_go_together(lvlm: tuple[Any, Any]) -> None:
    model, processor = lvlm
    with pytest.raises(ArgumentError, match=r"'fastrm' takes no options, and a head.*from_pretrained"):
        Explainer(model, processor, method="fastrm")
    with pytest.raises(ArgumentError, match="'fastrm' takes no options"):
        Explainer(model, processor, method="fastrm", head=make_head(model), options=GlimpseOptions())
    with pytest.raises(ModelMismatchError, match="not recorded"):
        Explainer(model, processor, head=make_head(hidden_size=model.config.get_text_config().hidden_size))


def test_the_command_explains_with_a_head(
    lvlm: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(lvlm[0], tmp_path / "model")
    model, *_ = load_checkpoint(tmp_path / "model")
    picture((64, 96)).save(tmp_path / "picture.png")
    make_head(model).save_pretrained(tmp_path / "head")
    words = ["explain", str(tmp_path / "picture.png"), QUESTION, "--model", str(tmp_path / "model")]
    words += ["--max-new-tokens", "2", "--out", str(tmp_path / "out"), "--json", "--method", "fastrm"]
    assert cli.main([*words, "--head", str(tmp_path / "head")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "fastrm" and all(0 < token["entropy"] < 1 for token in found["tokens"])
    assert cli.main(words) == 2
    assert "--method fastrm: give --head" in capsys.readouterr().err
    make_head(hidden_size=8).save_pretrained(tmp_path / "other")
    assert cli.main([*words, "--head", str(tmp_path / "other")]) == 2
    assert "width 8" in capsys.readouterr().err
