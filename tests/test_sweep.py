"""The sweep leaves no trace, refuses what it cannot do, and its attention is the same on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import native
from support.models import answer_targets, build
from support.state import Stop, assert_same, fingerprint, in_two_threads, put_to_use
from torch import Tensor, nn

import lvlm_fastxai as fx
from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError, FastXAIError, UnsupportedModelError
from lvlm_fastxai.explain.relevancy_rows import explain_rows
from lvlm_fastxai.methods import _base, chefer
from lvlm_fastxai.sweep import attention, flash, plan
from lvlm_fastxai.sweep.descent import Descent
from lvlm_fastxai.sweep.forward import Sweep
from lvlm_fastxai.sweep.tape import Tape, current_tape

MEMORY = ("fast", "lean", "min")


@pytest.fixture
def llava() -> tuple[nn.Module, dict[str, Any]]:
    return build("llava", torch.float32)


@pytest.fixture
def used(llava: tuple[nn.Module, dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """A model in the middle of its owner's work: partly frozen, in training mode, with gradients and dropout."""
    model, inputs = llava
    put_to_use(model)
    return model, inputs


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("method", ["chefer", "lvlm_interpret", "glimpse", "raw_attention"])
def test_the_model_comes_back_as_it_was(used: tuple[nn.Module, dict[str, Any]], memory: str, method: str) -> None:
    model, inputs = used
    before = fingerprint(model)
    targets = answer_targets(inputs, 0)
    fx.relevancy_rows(model, inputs, targets, method=method, memory=memory, prompt_length=targets[0][1] + 1)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("where", ["vision", "layer", "head", "descent", "product", "attention"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_an_exception_anywhere_leaves_nothing_behind(
    used: tuple[nn.Module, dict[str, Any]],
    memory: str,
    where: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = used
    before = fingerprint(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    decoder = model.get_decoder()
    modules = {"layer": decoder.layers[1].mlp, "head": model.get_output_embeddings()}
    if where == "vision":
        monkeypatch.setattr(type(model.model.vision_tower), "forward", fail)
    elif where == "descent":
        monkeypatch.setattr(chefer, "row_times_relevancy", fail)
    elif where == "product":
        monkeypatch.setattr(attention.ops, "attention_backward_relevancy", fail)
    elif where == "attention":
        monkeypatch.setattr(attention.FlashAttention, "backward", staticmethod(fail))
    else:
        monkeypatch.setattr(modules[where], "forward", fail)
    with pytest.raises(error):
        fx.relevancy_rows(model, inputs, answer_targets(inputs, 0), memory=memory)
    monkeypatch.undo()
    assert_same(before, fingerprint(model))
    assert current_tape.get() is None
    assert torch.is_grad_enabled()
    rows = fx.relevancy_rows(model, inputs, answer_targets(inputs, 0), memory=memory)
    assert torch.isfinite(rows).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory", MEMORY)
def test_the_caller_s_gradient_mode_does_not_matter(
    llava: tuple[nn.Module, dict[str, Any]], mode: type, memory: str
) -> None:
    model, inputs = llava
    targets = answer_targets(inputs, 0)
    expected = fx.relevancy_rows(model, inputs, targets)
    with mode():
        found = fx.relevancy_rows(model, inputs, targets, memory=memory)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_training_mode_does_not_turn_dropout_on(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = llava
    expected = fx.relevancy_rows(model, inputs, answer_targets(inputs, 0))
    model.config.text_config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert torch.equal(fx.relevancy_rows(model, inputs, answer_targets(inputs, 0)), expected)


@pytest.mark.parametrize("memory", MEMORY)
def test_more_targets_than_fit_are_chunked(
    llava: tuple[nn.Module, dict[str, Any]], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llava
    targets = [target for sample in range(2) for target in answer_targets(_twice(inputs), sample)]
    batch = _twice(inputs)
    expected = fx.relevancy_rows(model, batch, targets)
    descents = []
    create = Descent.__init__

    def counted(self: Descent, sweep: Sweep, slots: list[Tensor], *args: Any, **kwargs: Any) -> None:
        descents.append(len(slots))
        create(self, sweep, slots, *args, **kwargs)

    monkeypatch.setattr(Descent, "__init__", counted)
    monkeypatch.setattr(_base, "GRADIENT_BUDGET_BYTES", 1)
    found = fx.relevancy_rows(model, batch, targets, memory=memory)
    assert descents == [1] * (len(targets) // 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def _twice(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat([value, value]) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def test_the_targets_order_is_kept(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = llava
    targets = answer_targets(_twice(inputs), 0) + answer_targets(_twice(inputs), 1)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(3)).tolist()
    rows = fx.relevancy_rows(model, _twice(inputs), targets)
    shuffled = fx.relevancy_rows(model, _twice(inputs), torch.tensor([targets[i] for i in order]))
    torch.testing.assert_close(shuffled, rows[order], rtol=1e-5, atol=1e-7)


def test_logits_and_probabilities_are_the_model_s(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = llava
    targets = answer_targets(inputs, 0)
    result = explain_rows(model, inputs, targets, method="lvlm_interpret", prompt_length=targets[0][1] + 1)
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    for index, (sample, row, token) in enumerate(targets):
        torch.testing.assert_close(result.logits[index], logits[sample, row, token], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            result.probabilities[index], logits[sample, row].softmax(-1)[token], rtol=1e-4, atol=1e-6
        )


def test_two_models_in_two_threads() -> None:
    pairs = [build("llava", torch.float32), build("qwen2_5_vl", torch.float32)]
    expected = [fx.relevancy_rows(model, inputs, answer_targets(inputs, 0)) for model, inputs in pairs]
    failures: list[str] = []

    def explain(index: int) -> None:
        model, inputs = pairs[index]
        for memory in MEMORY * 2:
            found = fx.relevancy_rows(model, inputs, answer_targets(inputs, 0), memory=memory)
            if not torch.allclose(found, expected[index], rtol=1e-5, atol=1e-7):
                failures.append(f"model {index}, {memory}")

    in_two_threads(explain)
    assert failures == []


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "at least one"),
        ([(0, 0)], "expected \\(sample, query_row, token_id\\)"),
        ([(1, 0, 0)], "sample 1 is out of range"),
        ([(0, 10_000, 0)], "query_row 10000 is out of range"),
        ([(0, -1, 0)], "query_row -1 is out of range"),
        ([(0, 0, 10_000)], "token_id 10000 is out of range"),
        (torch.zeros(3), "integer tensor"),
        ("nonsense", "triples"),
    ],
)
def test_bad_targets(llava: tuple[nn.Module, dict[str, Any]], targets: Any, message: str) -> None:
    model, inputs = llava
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=message):
        fx.relevancy_rows(model, inputs, targets)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "magic"}, ArgumentError, "chefer, lvlm_interpret, glimpse, raw_attention"),
        ({"memory": "none"}, ArgumentError, "fast, lean, min"),
        ({"row_tolerance": 1.0}, ArgumentError, "row_tolerance"),
        ({"row_tolerance": -0.1}, ArgumentError, "row_tolerance"),
        ({"row_tolerance": "some"}, ArgumentError, "row_tolerance"),
        ({"method": "lvlm_interpret"}, ArgumentError, "prompt_length"),
        ({"method": "lvlm_interpret", "prompt_length": 0}, ArgumentError, "prompt_length"),
    ],
)
def test_bad_arguments(
    llava: tuple[nn.Module, dict[str, Any]], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, inputs = llava
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        fx.relevancy_rows(model, inputs, answer_targets(inputs, 0), **arguments)
    assert_same(before, fingerprint(model))


def test_lvlm_interpret_explains_generated_tokens_only(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = llava
    (_, row, token), *_ = answer_targets(inputs, 0)
    for target, message in (((0, row, token + 1), "was not generated"), ((0, row - 1, token), "inside the prompt")):
        with pytest.raises(ArgumentError, match=message):
            fx.relevancy_rows(model, inputs, [target], method="lvlm_interpret", prompt_length=row + 1)


def test_a_padded_row_is_refused(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = llava
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :2] = 0
    with pytest.raises(ArgumentError, match="is padding"):
        fx.relevancy_rows(model, {**inputs, "attention_mask": mask}, [(0, 1, 3)])


def test_a_hole_in_the_mask_is_refused(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = llava
    before = fingerprint(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 5] = 0
    with pytest.raises(UnsupportedModelError, match="gap"):
        fx.relevancy_rows(model, {**inputs, "attention_mask": mask}, answer_targets(inputs, 0))
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("method", ["chefer", "lvlm_interpret"])
def test_nan_logits_are_refused(llava: tuple[nn.Module, dict[str, Any]], method: str) -> None:
    model, inputs = llava
    targets = answer_targets(inputs, 0)
    with torch.no_grad():
        model.get_output_embeddings().weight[targets[0][2]] = float("nan")
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match="finite logits"):
        fx.relevancy_rows(model, inputs, targets[:1], method=method, prompt_length=targets[0][1] + 1)
    assert_same(before, fingerprint(model))


def test_a_model_whose_attention_is_its_own_is_refused(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    """A layer that never calls the registered function, as BLIP v1's, must not pass for a map of zeros."""
    model, inputs = llava

    class OwnAttention(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    layer = model.get_decoder().layers[1]
    layer.self_attn = OwnAttention()
    for memory in MEMORY:
        with pytest.raises(UnsupportedModelError, match="called the registered attention 0 times"):
            fx.relevancy_rows(model, inputs, answer_targets(inputs, 0), memory=memory)


def test_models_that_are_no_decoders_are_refused() -> None:
    from transformers import BlipConfig, BlipForQuestionAnswering, T5Config, T5ForConditionalGeneration

    tiny = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    blip = BlipForQuestionAnswering(BlipConfig(text_config={**small, "vocab_size": 20}, vision_config=small))
    for model in (T5ForConditionalGeneration(T5Config(**tiny)), blip, nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError):
            fx.relevancy_rows(model, inputs, [(0, 1, 1)])


def test_an_absent_backend_is_refused_and_never_replaced(llava: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = llava
    before = fingerprint(model)
    with fx.use_backend("cuda"), pytest.raises(BackendUnavailableError, match="cuda"):
        fx.relevancy_rows(model, inputs, answer_targets(inputs, 0))
    assert_same(before, fingerprint(model))


def test_every_error_is_of_the_package() -> None:
    assert all(issubclass(e, FastXAIError) for e in (ArgumentError, BackendUnavailableError, UnsupportedModelError))


LAYOUTS = {
    "causal": lambda row, rows: (0, row + 1),
    "full": lambda row, rows: (0, rows),
    "window": lambda row, rows: (max(0, row - 4), row + 1),
    "prefix": lambda row, rows: (0, max(9, row + 1)),
    "left padding": lambda row, rows: (3, row + 1) if row >= 3 else (0, 0),
    "right padding": lambda row, rows: (0, min(row + 1, rows - 5)),
    "blocks": lambda row, rows: (0, 20) if 8 <= row < 20 else (0, row + 1),
    "packed": lambda row, rows: (row // 7 * 7, row + 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("library", "blind"), [(flash.CpuFlash, False), (flash.Blocked, False), (flash.Blocked, True)])
def test_attention_equals_the_dense_one(
    layout: str, library: type, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and all gradients against masked softmax attention in fp64, whatever segments the plan chose."""
    for module in (plan, flash):
        monkeypatch.setattr(module, "ROW_BLOCK", 8)
    monkeypatch.setattr(attention, "library_of", lambda query: library)
    torch.manual_seed(0)
    batch, heads, groups, rows, width = 2, 4, 2, 37, 5
    query = torch.randn(batch, heads, rows, width, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(batch, groups, rows, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ranges = torch.tensor([LAYOUTS[layout](row, rows) for row in range(rows)], dtype=torch.int32)
    ranges = torch.stack([ranges, ranges])
    if layout in ("left padding", "window"):  # samples that differ cannot share a segment
        ranges[1] = torch.tensor([LAYOUTS["causal"](row, rows) for row in range(rows)])
    column = torch.arange(rows)
    visible = ((column >= ranges[..., :1]) & (column < ranges[..., 1:]))[:, None]
    # A finite mask keeps the softmax of a row that sees nothing differentiable; its share is taken out afterwards.
    scores = (query @ key.repeat_interleave(2, 1).mT * 0.3).masked_fill(~visible, -1e300)
    probability = scores.softmax(-1) * visible
    dense = probability @ value.repeat_interleave(2, 1)
    tape = Tape()
    cover = plan.plan_blind(ranges, rows) if blind else plan.plan_attention(ranges)
    ours = attention.FlashAttention.apply(query, key, value, cover, 0.3, tape)
    torch.testing.assert_close(ours, dense)
    seen = visible.any(-1).expand(batch, heads, rows)
    torch.testing.assert_close(tape.record.logsumexp[seen], scores.logsumexp(-1)[seen])
    upstream = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, (query, key, value), upstream)
    found = torch.autograd.grad(ours, (query, key, value), upstream)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)
    assert tape.record.grad_output is not None
    torch.testing.assert_close(tape.record.grad_output, upstream)
    assert all(segment.rows.stop - segment.rows.start <= 8 for segment in cover.segments if segment.masked)


def test_plans_use_few_calls() -> None:
    rows = 1000

    def calls(layout: str) -> int:
        ranges = torch.tensor([LAYOUTS[layout](row, rows) for row in range(rows)], dtype=torch.int32)
        return len(plan.plan_attention(ranges[None]).segments)

    assert calls("causal") == calls("full") == calls("left padding") == 1
    assert calls("right padding") == 2
    assert calls("window") <= 2 + rows // plan.ROW_BLOCK
    assert calls("prefix") <= 2 + rows // plan.ROW_BLOCK


def test_keys_beyond_32_bits_are_refused_and_do_not_wrap() -> None:
    assert plan.plain_ranges(1, 1, 2**31 - 1, True, torch.device("cpu"))[0, 0].tolist() == [0, 2**31 - 1]
    with pytest.raises(UnsupportedModelError, match="32 bits"):
        plan.plain_ranges(1, 1, 2**31, True, torch.device("cpu"))


@native
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("row_tolerance", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_both_backwards_give_the_same_rows(
    family: str, row_tolerance: float, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused backward, and torch's own followed by the product, of several targets and samples."""
    model, inputs = build(family, torch.float32, batch=2, padding="left")
    targets = [*answer_targets(inputs, 0), *answer_targets(inputs, 1)]
    called = []
    fused = attention.ops.attention_backward_relevancy

    def count(*args: Any, **kwargs: Any) -> Any:
        called.append(kwargs["backend"])
        return fused(*args, **kwargs)

    monkeypatch.setattr(attention.ops, "attention_backward_relevancy", count)
    monkeypatch.setattr(attention, "FUSED_RATIO", {"cpu": 0.5})
    found = fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=row_tolerance)
    assert set(called) == {"cpu"}
    called.clear()
    monkeypatch.setattr(attention, "FUSED_RATIO", {})
    expected = fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=row_tolerance)
    assert called == []
    assert (found - expected).abs().sum() <= 1e-5 * expected.abs().sum()
