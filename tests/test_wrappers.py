"""A model in a wrapper of PEFT or torch.compile is explained as the model inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import answer_targets, build
from support.state import assert_same, fingerprint
from torch import nn

import lvlm_fastxai as fx
from lvlm_fastxai.errors import UnsupportedModelError
from lvlm_fastxai.models.decoder import unwrap
from lvlm_fastxai.sweep.recording import Recorder

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(task: str | None) -> tuple[Any, dict[str, Any]]:
    """A LoRA-wrapped LLaVA whose adapter changes what it computes."""
    peft = pytest.importorskip("peft")
    model, inputs = build("llava", torch.float32, layers=2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task)
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped, inputs


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_s_rows_are_the_merged_model_s(task: str | None, memory: str) -> None:
    wrapped, inputs = adapted(task)
    targets = answer_targets(inputs, 0)
    before = fingerprint(wrapped)
    found = fx.relevancy_rows(wrapped, inputs, targets, memory=memory)
    with Recorder(wrapped):
        pass
    assert_same(before, fingerprint(wrapped))
    with wrapped.disable_adapter():
        plain = fx.relevancy_rows(wrapped, inputs, targets, memory=memory)
    merged = fx.relevancy_rows(wrapped.merge_and_unload(), inputs, targets, memory=memory)
    torch.testing.assert_close(found, merged, rtol=1e-3, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3, "the adapter changed nothing"
    # Without the picture the rows would be others.
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert (found - fx.relevancy_rows(wrapped, blank, targets)).abs().max() > 1e-3


def test_a_compiled_model_s_rows_are_those_of_the_model_inside() -> None:
    model, inputs = build("llava", torch.float32, layers=2)
    targets = answer_targets(inputs, 0)
    compiled: Any = torch.compile(model)
    assert unwrap(compiled) is unwrap(nn.DataParallel(model)) is model
    assert torch.equal(fx.relevancy_rows(compiled, inputs, targets), fx.relevancy_rows(model, inputs, targets))


def test_an_adapter_that_adds_positions_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build("llama", torch.float32, layers=2)
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="adds positions to the prompt"):
        fx.relevancy_rows(wrapped, inputs, answer_targets(inputs, 0))
