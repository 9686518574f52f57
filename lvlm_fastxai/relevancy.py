"""Relevancy rows of explained logits: the entry point below :class:`~lvlm_fastxai.explainer.Explainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .errors import ArgumentError
from .sweep import Sweep
from .targets import check_targets


@dataclass(frozen=True)
class RelevancyRows:
    """rows (N, S) fp32 (fp64 for an fp64 model) · logits, probabilities (N,) of the targets."""

    rows: Tensor
    logits: Tensor
    probabilities: Tensor


def relevancy_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor | Sequence[tuple[int, int, int]],
    *,
    method: str = "chefer",
    memory: str = "fast",
    row_tolerance: float = 0.0,
    prompt_length: int | Sequence[int] | None = None,
) -> Tensor:
    """Relevancy of every position for each of N explained logits, without an S×S tensor.

    Chefer, Gur and Wolf, "Generic Attention-model Explainability" (ICCV 2021), self-attention rule on a decoder-only
    model: the row R[q*, :] of R = (I + Ā_L) … (I + Ā_1) with Ā_l = mean_h max(0, dP_l[h] ∘ P_l[h]).

    Args:
        model: a transformers image-text-to-text or causal-LM model, any device or dtype; left as it was found.
        inputs: keyword arguments of ``model.forward`` for B samples, prompt and answer already joined.
        targets: (N, 3) integers or a sequence of (sample, query_row, token_id). The query row is the one whose logits
            produced the token: a token at column p has query row p − 1. The explained scalar is the raw logit.
        method: "chefer", "lvlm_interpret" (needs ``prompt_length``) or "raw_attention".
        memory: "fast" keeps activations, "lean" recomputes layer by layer, "min" also keeps the layer inputs off the
            device.
        row_tolerance: 0, the exact sweep. (The pruned sweep is not in this version.)
        prompt_length: column at which the answer starts; an integer, or one for each sample.

    Returns:
        (N, S) fp32 (fp64 for an fp64 model), self entry included; padding columns are zero.

    Raises:
        ArgumentError: a bad argument, a target out of range or on padding, logits that are not finite.
        UnsupportedModelError: the model's attention cannot be registered, or its mask is out of scope.
        BackendUnavailableError: the backend that was asked for cannot serve the call.

    Example:
        >>> import lvlm_fastxai as fx
        >>> model, processor = fx.load_tiny_lvlm()
        >>> inputs = processor(images=image, text=prompt + answer, return_tensors="pt")  # doctest: +SKIP
        >>> row = inputs["input_ids"].shape[1] - 2                                       # doctest: +SKIP
        >>> token = int(inputs["input_ids"][0, -1])                                      # doctest: +SKIP
        >>> fx.relevancy_rows(model, inputs, [(0, row, token)]).shape                    # doctest: +SKIP
        torch.Size([1, 160])
    """
    return explain_rows(
        model,
        inputs,
        targets,
        method=method,
        memory=memory,
        row_tolerance=row_tolerance,
        prompt_length=prompt_length,
    ).rows


def explain_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor | Sequence[tuple[int, int, int]],
    *,
    method: str = "chefer",
    memory: str = "fast",
    row_tolerance: float = 0.0,
    prompt_length: int | Sequence[int] | None = None,
) -> RelevancyRows:
    """:func:`relevancy_rows` with the targets' logits and probabilities, which the same forward gives."""
    check_row_tolerance(row_tolerance)
    # Inference tensors could not be saved for backward, so neither may be in the way of one.
    with torch.inference_mode(False):
        inputs = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in inputs.items()}
        return _explain(model, inputs, targets, method, memory, prompt_length)


def _explain(
    model: nn.Module,
    inputs: dict[str, Any],
    targets: Tensor | Sequence[tuple[int, int, int]],
    method: str,
    memory: str,
    prompt_length: int | Sequence[int] | None,
) -> RelevancyRows:
    chosen = methods.find(method)
    checked = check_targets(targets, inputs, _vocabulary(model))
    run = chosen(checked, inputs, prompt_length)
    # Without gradients there is nothing to keep: "lean" drops the activations, and the top layer is run once more.
    memory_of_forward = memory if chosen.needs_gradient or memory == "min" else "lean"
    with Sweep(model, inputs, run.explained.row_table(), memory_of_forward) as sweep:
        rows = run.rows(sweep)
        with torch.no_grad():
            logits = checked.select(sweep.logits, run.explained.rows_of_samples)
            token = torch.tensor(checked.token_ids, device=logits.device)[:, None]
            probabilities = logits.softmax(-1).gather(1, token)[:, 0]
            return RelevancyRows(rows, logits.gather(1, token)[:, 0].detach(), probabilities.detach())


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def check_row_tolerance(row_tolerance: float) -> None:
    """Refuse a sweep that this version does not have.

    Raises:
        ArgumentError: a tolerance other than 0.
    """
    if row_tolerance != 0:
        raise ArgumentError(f"row_tolerance: only the exact sweep (0.0) is available, got {row_tolerance}")
