"""A sweep that starts from what generate() computed gives the rows of one with a forward of its own."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from support import models, oracle
from support.state import assert_same, fingerprint
from torch import Tensor, nn

import lvlm_fastxai as fx
from lvlm_fastxai import tiny
from lvlm_fastxai.explain.relevancy_rows import explain_rows
from lvlm_fastxai.sweep.forward import Recording
from lvlm_fastxai.sweep.pruning import RELEVANCY_WEIGHT
from lvlm_fastxai.sweep.recording import Recorder, logits_agree

pytestmark = pytest.mark.usefixtures("one_thread")

# Per-position inputs that stop where the answer begins; the rest belongs to the pictures.
PER_POSITION = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
NEW_TOKENS = 5
# Families whose generate() leaves nothing that a sweep could start from, and what is said of them.
REFUSED = {"qwen3_vl": "changes the states between", "gemma3": "its cache dropped keys"}


def recorded(model: nn.Module, inputs: dict[str, Any]) -> tuple[Recording | None, str | None, Tensor, Tensor]:
    """What generate() left, why it is of no use, the tokens read and the (steps, V) logits."""
    recorder = Recorder(model)
    with recorder, torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=[models.IMAGE, models.VIDEO],  # a marker would ask for a picture that is not there
            output_logits=True,
            return_dict_in_generate=True,
        )
    return *recorder.recording(), output.sequences, torch.cat(output.logits)


def prompt_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v[:, : -models.ANSWER] if k in PER_POSITION else v for k, v in inputs.items()}


def joined(prompt: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Teacher-forced inputs for all tokens but the last, which generate() never read; the answer's types are 0."""
    extra = tokens.shape[1] - 1 - prompt["input_ids"].shape[1]
    whole = {**prompt, "input_ids": tokens[:, :-1]}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in prompt:
            whole[name] = torch.cat([prompt[name], prompt[name].new_full((1, extra), fill)], 1)
    return whole


@pytest.mark.parametrize("memory", ["fast", "lean", "min"])
@pytest.mark.parametrize("name", [name for name in models.NAMES if name not in (*REFUSED, "paligemma")])
def test_rows_are_those_of_a_forward(name: str, memory: str) -> None:
    model, inputs = models.build(name, torch.float32)
    prompt = prompt_of(inputs)
    recording, reason, tokens, _ = recorded(model, prompt)
    assert recording is not None, reason
    start = prompt["input_ids"].shape[1]
    assert recording.columns == start + NEW_TOKENS - 1
    targets = [(0, column - 1, int(tokens[0, column])) for column in range(start, start + NEW_TOKENS)]
    whole = joined(prompt, tokens)
    for tolerance in (0.0, 0.2):
        truth = explain_rows(model, whole, targets, memory="lean", row_tolerance=tolerance)
        found = explain_rows(model, whole, targets, memory=memory, row_tolerance=tolerance, recording=recording)
        # Token by token against all at once: the same numbers, rounded in another order. A row of nearly the same
        # norm as the next may then be kept in its place.
        bound = 1e-5 if tolerance == 0 else 1e-3
        assert float(oracle.relative_error(found.rows, truth.rows).max()) < bound
        torch.testing.assert_close(found.logits, truth.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.probabilities, truth.probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_a_recording_that_cannot_be_used_says_why(name: str) -> None:
    model, inputs = models.build(name, torch.float32)
    recording, reason, _, _ = recorded(model, prompt_of(inputs))
    assert recording is None
    assert reason is not None and REFUSED[name] in reason


def test_inference_mode_is_refused() -> None:
    model, inputs = models.build("llava", torch.float32)
    recorder = Recorder(model)
    with recorder, torch.inference_mode():
        model.generate(**prompt_of(inputs), max_new_tokens=2)  # type: ignore[operator]
    assert recorder.recording()[0] is None


def test_the_model_comes_back_as_it_was() -> None:
    model, inputs = models.build("llava", torch.float32)
    model.train()
    before = fingerprint(model)
    recorded(model, prompt_of(inputs))
    assert_same(before, fingerprint(model))
    with pytest.raises(KeyboardInterrupt), Recorder(model):
        raise KeyboardInterrupt
    assert_same(before, fingerprint(model))


def test_logits_agree_up_to_rounding_only() -> None:
    found = torch.tensor([1.0, -7.0])
    assert logits_agree(found, found + 1e-6, torch.tensor(7.0), torch.float32)
    assert not logits_agree(found, found * 1.01, torch.tensor(7.0), torch.float32)
    assert not logits_agree(found, found * torch.nan, torch.tensor(7.0), torch.float32)
    assert logits_agree(found, found * 1.01, torch.tensor(7.0), torch.bfloat16)


class Forwards:
    """Counts the forwards of a model that read the whole prompt."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.count += kwargs["input_ids"].shape[1] > 1


@pytest.fixture
def shipped() -> tuple[nn.Module, Any]:
    return fx.load_tiny_lvlm()


@pytest.mark.parametrize("method", ["chefer", "lvlm_interpret", "glimpse"])
@pytest.mark.parametrize(
    ("memory", "tolerance", "reads"),
    [("lean", 0.0, 1), ("fast", 0.1, 1), ("lean", 0.1, 1), ("fast", 0.0, 1), ("min", 0.0, 2), ("min", 0.1, 2)],
)
def test_how_often_an_explanation_reads_the_prompt(
    shipped: tuple[nn.Module, Any], memory: str, tolerance: float, reads: int, method: str
) -> None:
    model, processor = shipped
    # The longest answer is shorter than the answer: its last token is chosen but never read, though one method sums
    # over it.
    arguments = {"max_new_tokens": 3} if method != "glimpse" else {}
    plain = fx.Explainer(model, processor, method=method, memory="min")  # takes a forward of its own
    exact = plain(tiny.SAMPLE_IMAGE, "describe the image.", **arguments)
    forwards = Forwards(model)
    explainer = fx.Explainer(model, processor, method=method, memory=memory, row_tolerance=tolerance)
    explanation = explainer(tiny.SAMPLE_IMAGE, "describe the image.", **arguments)
    assert forwards.count == reads
    assert explanation.answer == exact.answer and len(explanation.tokens) == arguments.get("max_new_tokens", 12)
    for found, truth in zip(explanation.tokens, exact.tokens, strict=True):
        bound = (1e-5 if tolerance == 0 else 0.05) * truth.image_map.sum()
        if method == "glimpse" and found.pruned is not None:
            bound = found.pruned.estimated_error * sum(truth.shares.values())  # of the row, of which this is a part
        assert np.abs(found.image_map - truth.image_map).sum() <= bound
        assert found.probability == pytest.approx(truth.probability, rel=1e-4)
        assert (found.pruned is None) == (tolerance == 0)
        if found.pruned is not None:
            assert len(found.pruned.rows_kept) == len(found.pruned.dropped) == 4
            assert 0 < max(found.pruned.dropped) <= (1 + RELEVANCY_WEIGHT) * tolerance
            assert found.pruned.estimated_error > 0


@pytest.mark.parametrize(("memory", "runs"), [("fast", 1), ("lean", 1), ("min", 2)])
def test_the_vision_tower_runs_once(shipped: tuple[nn.Module, Any], memory: str, runs: int) -> None:
    model, processor = shipped
    calls: list[int] = []
    tower: Any = model.get_submodule("model.vision_tower")
    tower.register_forward_pre_hook(lambda module, args: calls.append(1))
    fx.Explainer(model, processor, memory=memory)(tiny.SAMPLE_IMAGE, tiny.SAMPLE_QUESTION)
    assert len(calls) == runs


def test_a_column_that_was_never_read_counts_where_all_columns_do(shipped: tuple[nn.Module, Any]) -> None:
    model, processor = shipped
    arguments = {"max_new_tokens": 3}
    for domain, reads in (("full", 2), ("causal", 1)):
        options = fx.GlimpseOptions(stats_domain=domain)
        exact = fx.Explainer(model, processor, method="glimpse", options=options, memory="min")
        truth = exact(tiny.SAMPLE_IMAGE, "describe the image.", **arguments)
        forwards = Forwards(model)
        explainer = fx.Explainer(model, processor, method="glimpse", options=options, memory="lean")
        found = explainer(tiny.SAMPLE_IMAGE, "describe the image.", **arguments)
        assert forwards.count == reads
        for one, other in zip(found.tokens, truth.tokens, strict=True):
            assert np.abs(one.image_map - other.image_map).sum() <= 1e-5 * other.image_map.sum()


def test_logits_that_are_changed_after_the_head_take_a_forward(
    shipped: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = shipped
    question, picture = tiny.SAMPLE_QUESTION, tiny.SAMPLE_IMAGE
    plain = type(model).forward

    def capped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = 5.0 * torch.tanh(output.logits / 5.0)
        return output

    capped.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", capped)
    exact = fx.Explainer(model, processor, memory="min")(picture, question)
    forwards = Forwards(model)
    explanation = fx.Explainer(model, processor, memory="lean")(picture, question)
    assert forwards.count == 2
    np.testing.assert_allclose(explanation.image_map, exact.image_map, rtol=1e-3, atol=1e-7)
