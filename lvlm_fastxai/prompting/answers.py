"""Greedy answers, one by one or in batches, and where they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from .. import families
from ..errors import ArgumentError
from ..models.guard import Guard, shielded
from .inputs import accepted


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        token_ids: up to the end token, which is left out.
        ended: False where `max_new_tokens` cut it.
        probabilities: of the tokens, NaN where they were not asked for.
        logits: (steps, V) fp32 on the CPU, that the tokens were chosen by, the end token's included; None where they
            were not asked for.
    """

    token_ids: list[int]
    ended: bool
    probabilities: list[float]
    logits: Tensor | None = None


def end_tokens(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """Ids of the tokens that end an answer: those at which ``generate()`` stops, or else the tokenizer's.

    Args:
        model: with a ``generation_config``.
        tokenizer: asked where the model names none.
    """
    for holder in (model.generation_config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            return frozenset(value if isinstance(value, list | tuple) else [value])
    return frozenset()


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    *,
    ends: frozenset[int],
    keep_logits: bool = False,
    recorder: AbstractContextManager[Any] | None = None,
    streamer: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Generate the greedy answers of B prompts, without a graph and in evaluation mode.

    A token that stands for a picture is never chosen: the teacher-forced pass would ask for its features.

    Args:
        model: a transformers model; left as it was found.
        inputs: the processor's outputs, padded on the left.
        max_new_tokens: longest answer.
        ends: ids of the tokens that end an answer, as `end_tokens` gives them.
        keep_logits: whether `Answer` gets probabilities and logits.
        recorder: a `sweep.recording.Recorder` to generate in.
        streamer: of ``generate()``.
        progress: called as ``progress(tokens, max_new_tokens)``.

    Raises:
        ArgumentError: logits that are NaN; inputs that the model does not take.
    """
    start = inputs["input_ids"].shape[1]
    media = [token for token in families.media_tokens(model.config) if token is not None]

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            # The largest of logits that hold a NaN is a token like any other: without this the answer is noise.
            if bool(scores.isnan().any()):
                raise ArgumentError(
                    "model: its logits are NaN; check the weights and the dtype (fp16 overflows, bf16 does not)"
                )
            progress(input_ids.shape[1] - start, max_new_tokens)
            markers = torch.tensor(media, device=scores.device, dtype=torch.long)
            return scores.index_fill(-1, markers, -torch.inf)

    progress(0, max_new_tokens)
    # Recorded tensors start a graph later on, so they must not be inference tensors.
    with recorder or Evaluating(model), torch.no_grad():
        output = model.generate(
            **accepted(model, inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # Sampling settings of the checkpoint would only cause warnings about having no effect.
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(ends) or None,
            logits_processor=LogitsProcessorList([Watch()]),
            return_dict_in_generate=True,
            output_logits=keep_logits,
            **({} if streamer is None else {"streamer": streamer}),
        )
    generated = output.sequences[:, start:].tolist()
    logits = torch.stack(output.logits, 1).float().cpu() if keep_logits else [None] * len(generated)
    return [_cut(tokens, own, ends) for tokens, own in zip(generated, logits, strict=True)]


def _cut(tokens: list[int], logits: Tensor | None, ends: frozenset[int]) -> Answer:
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    kept = tokens[:length]
    probabilities = [math.nan] * length
    if logits is not None:
        probabilities = logits[:length].softmax(-1)[range(length), kept].tolist()
    return Answer(kept, length < len(tokens), probabilities, logits)


class Evaluating:
    """Evaluation mode inside a ``with`` block, each module's own mode again afterwards, also after Ctrl-C.

    Args:
        model: it is held meanwhile: other threads that want it wait.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._guard = Guard(model)

    def __enter__(self) -> None:
        try:
            self._guard.open()
            self._evaluate()
        except BaseException:
            self._guard.close()
            raise

    @shielded
    def _evaluate(self) -> None:
        for module in self._model.modules():
            if module.training:
                self._guard.on_close(setattr, module, "training", True)
                module.training = False

    @shielded
    def __exit__(self, *exception: object) -> None:
        self._guard.close()


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers are the same, white space and case aside.

    Example:
        >>> same_answer("A red  circle", "a red circle")
        True
    """
    return answer.casefold().split() == reference.casefold().split()
