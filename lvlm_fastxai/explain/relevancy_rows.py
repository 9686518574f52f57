"""Relevancy rows of explained logits: the entry point below :class:`~lvlm_fastxai.explain.explainer.Explainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import ArgumentError
from ..methods import registry
from ..sweep.forward import Recording, Sweep
from ..sweep.pruning import Certificate
from ..sweep.targets import check_targets


@dataclass(frozen=True)
class RelevancyRows:
    """rows (N, S) fp32 (fp64 for an fp64 model) · logits, probabilities (N,) of the targets · certificate: what a sweep
    kept; None for a method without one · fallback: why a pruned sweep swept its layers whole; None if it did not ·
    compared: (N, S) rows of `chefer` for the same targets, where they were asked for."""

    rows: Tensor
    logits: Tensor
    probabilities: Tensor
    certificate: Certificate | None = None
    fallback: str | None = None
    compared: Tensor | None = None


def relevancy_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor | Sequence[tuple[int, int, int]],
    *,
    method: str = "chefer",
    memory: str = "fast",
    row_tolerance: float | str = 0.0,
    prompt_length: int | Sequence[int] | None = None,
    options: Any = None,
) -> Tensor:
    """Relevancy of every position for each of N explained logits, without an S×S tensor.

    Chefer, Gur and Wolf, "Generic Attention-model Explainability" (ICCV 2021), self-attention rule on a decoder-only
    model: the row R[q*, :] of R = (I + Ā_L) … (I + Ā_1) with Ā_l = mean_h max(0, dP_l[h] ∘ P_l[h]).

    Args:
        model: a transformers image-text-to-text or causal-LM model, any device or dtype; left as it was found. Where
            its heads are split over the ranks of a ``torch.distributed`` group, every rank makes the same call and
            gets all rows.
        inputs: keyword arguments of ``model.forward`` for B samples, prompt and answer already joined.
        targets: (N, 3) integers or a sequence of (sample, query_row, token_id). The query row is the one whose logits
            produced the token: a token at column p has query row p − 1. The explained scalar is the raw logit.
        method: "chefer", "lvlm_interpret" (needs ``prompt_length``), "glimpse" or "raw_attention".
        memory: "fast" keeps activations, "lean" recomputes layer by layer, "min" also keeps the layer inputs off the
            device.
        row_tolerance: 0, the exact sweep. ε > 0, the pruned sweep: at every layer the rows that hold a share 1 − ε of
            what it adds to the map and hands down. "auto": pruned as far as the estimated error stays below the
            rounding error of a bf16 model; exact for the other dtypes, and for "glimpse".
        prompt_length: column at which the answer starts; an integer, or one for each sample.
        options: `GlimpseOptions` for method "glimpse"; None for its defaults. The other methods have none.

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
        options=options,
    ).rows


def explain_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor | Sequence[tuple[int, int, int]],
    *,
    method: str = "chefer",
    memory: str = "fast",
    row_tolerance: float | str = 0.0,
    prompt_length: int | Sequence[int] | None = None,
    options: Any = None,
    recording: Recording | None = None,
    compare: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_rows: Callable[[list[int], Tensor, Tensor], None] | None = None,
) -> RelevancyRows:
    """:func:`relevancy_rows` with the targets' logits and probabilities, which the same forward gives.

    Args:
        recording: what ``generate()`` computed for ``inputs``, in the place of that forward.
        compare: for method "glimpse", the rows of "chefer" too; they come of the same backward.
        progress: called as ``progress(done, total)`` on the way.
        on_rows: takes the targets' numbers, their rows (n, S) and probabilities (n,) as they are done; the result then
            has no rows, so that the answer may be as long as it likes (`Aggregator`).
    """
    check_row_tolerance(row_tolerance)
    # Inference tensors could not be saved for backward, so neither may be in the way of one.
    with torch.inference_mode(False):
        inputs = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in inputs.items()}
        kind, traits = methods.find(method), registry.find(method)
        traits.check_options(options)
        run = kind(check_targets(targets, inputs, _vocabulary(model)), inputs, prompt_length, options)
        if progress is not None:
            run.progress = progress
        if compare:
            if traits.companion is None:
                raise ArgumentError(f"compare: method {method!r} has no other method's rows to compare with its own")
            if on_rows is not None:
                raise ArgumentError("compare: rows that are handed on are not compared; leave out on_rows")
            run.compare = True  # type: ignore[attr-defined]
        return _explain(model, inputs, run, memory, row_tolerance, recording, on_rows)


def _explain(
    model: nn.Module,
    inputs: dict[str, Any],
    run: methods.Method,
    memory: str,
    row_tolerance: float | str,
    recording: Recording | None,
    on_rows: Callable[[list[int], Tensor, Tensor], None] | None,
) -> RelevancyRows:
    targets = run.targets
    # Without gradients there is nothing to keep: "lean" drops the activations, and the top layer is run once more.
    memory_of_forward = memory if run.needs_gradient or memory == "min" else "lean"
    tolerance = run.tolerance(row_tolerance)
    with Sweep(model, inputs, run.explained.row_table(), memory_of_forward, tolerance, recording) as sweep:
        with torch.no_grad():
            logits = targets.select(sweep.logits, run.explained.rows_of_samples)
            token = torch.tensor(targets.token_ids, device=logits.device)[:, None]
            probabilities = logits.softmax(-1).gather(1, token)[:, 0]
            logit = logits.gather(1, token)[:, 0]
            del logits
        if on_rows is not None:
            run.on_rows = lambda numbers, rows: on_rows(numbers, rows, probabilities[numbers])
        rows = run.rows(sweep)
        return RelevancyRows(rows, logit, probabilities, run.certificate, sweep.fallback, run.compared)


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def check_row_tolerance(row_tolerance: float | str) -> None:
    """Refuse what is no tolerance.

    Raises:
        ArgumentError: neither "auto" nor a number from 0 (exact) to below 1.
    """
    if row_tolerance == "auto":
        return
    if isinstance(row_tolerance, str) or not 0 <= row_tolerance < 1:
        raise ArgumentError(
            f'row_tolerance: expected "auto" or a number from 0 (exact) to below 1, got {row_tolerance!r}'
        )
