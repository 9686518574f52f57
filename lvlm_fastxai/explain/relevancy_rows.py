"""Relevancy rows of explained logits: the entry point below :class:`~lvlm_fastxai.explain.explainer.Explainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..choices import Memory, RowTolerance
from ..errors import ArgumentError, UnsupportedModelError
from ..methods import registry
from ..methods.glimpse_options import GlimpseOptions
from ..methods.registry import MethodName
from ..models.decoder import unwrap
from ..sweep.forward import Recording, Sweep
from ..sweep.pruning import Certificate, plan_sweep
from ..sweep.targets import check_targets


@dataclass(frozen=True)
class RelevancyRows:
    """Rows of N targets, and what the same forward says of them.

    Attributes:
        rows: (N, S) fp32, fp64 for an fp64 model.
        logits: (N,) the explained scalars.
        probabilities: (N,) softmax of the targets' logits.
        certificate: what a sweep kept of each target; None for a method that does not go down the layers.
        fallback: why a pruned sweep swept its layers whole; None if it did not.
        compared: (N, S) rows of the method's companion for the same targets, where they were asked for.

    Example:
        >>> found = RelevancyRows(torch.eye(3)[1:], torch.zeros(2), torch.full((2,), 0.5))
        >>> found.rows.shape, found.certificate
        (torch.Size([2, 3]), None)
    """

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
    method: MethodName = "chefer",
    memory: Memory = "fast",
    row_tolerance: RowTolerance = 0.0,
    prompt_length: int | Sequence[int] | None = None,
    options: GlimpseOptions | None = None,
) -> Tensor:
    """Compute the relevancy of every position for each of N explained logits, without an S×S tensor.

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
        >>> inputs = processor(text=["what color is the circle?"], return_tensors="pt")
        >>> columns = inputs["input_ids"].shape[1]
        >>> token = int(inputs["input_ids"][0, -1])  # it was read at the row before
        >>> rows = fx.relevancy_rows(model, inputs, [(0, columns - 2, token)])
        >>> rows.shape == (1, columns) and float(rows[0, -1])
        0.0
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
    method: MethodName = "chefer",
    memory: Memory = "fast",
    row_tolerance: RowTolerance = 0.0,
    prompt_length: int | Sequence[int] | None = None,
    options: GlimpseOptions | None = None,
    recording: Recording | None = None,
    compare: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_rows: Callable[[list[int], Tensor, Tensor], None] | None = None,
) -> RelevancyRows:
    """Compute :func:`relevancy_rows` with the targets' logits and probabilities, which the same forward gives.

    Args:
        model, inputs, targets, method, memory, row_tolerance, prompt_length, options: as for `relevancy_rows`.
        recording: what ``generate()`` computed for ``inputs``, in the place of that forward.
        compare: whether the rows of the method's companion are wanted too ("chefer" for "glimpse"); the same backward
            gives them.
        progress: called as ``progress(done, total)`` on the way.
        on_rows: takes the targets' numbers, their rows (n, S) and probabilities (n,) as they are done; the result then
            has no rows, so that the answer may be as long as it likes (`Aggregator`).

    Returns:
        RelevancyRows: the rows, and what the forward says of the targets.

    Raises:
        ArgumentError, UnsupportedModelError, BackendUnavailableError: as `relevancy_rows`; or the method has no
            companion to compare with.

    Example:
        >>> import lvlm_fastxai as fx
        >>> model, processor = fx.load_tiny_lvlm()
        >>> inputs = processor(text=["what color is the circle?"], return_tensors="pt")
        >>> found = fx.explain_rows(model, inputs, [(0, 1, 5), (0, 2, 5)])
        >>> found.logits.shape, bool((found.probabilities <= 1).all())
        (torch.Size([2]), True)
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
            run.compare = True
        return _explain(model, inputs, run, memory, row_tolerance, recording, on_rows)


def _explain(
    model: nn.Module,
    inputs: dict[str, Any],
    run: methods.Method,
    memory: Memory,
    row_tolerance: RowTolerance,
    recording: Recording | None,
    on_rows: Callable[[list[int], Tensor, Tensor], None] | None,
) -> RelevancyRows:
    targets = run.targets
    traits, dtype = run.traits, getattr(unwrap(model), "dtype", None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model with a decoder")
    # Without gradients there is nothing to keep: "lean" drops the activations, and the top layer is run once more.
    memory_of_forward = memory if traits.needs_gradient or memory == "min" else "lean"
    plan = plan_sweep(
        row_tolerance,
        memory,
        dtype,
        targets.columns,
        needs_gradient=traits.needs_gradient,
        prunes_by_itself=traits.prunes_by_itself,
    )
    with Sweep(model, inputs, run.explained.row_table(), memory_of_forward, plan.tolerances, recording) as sweep:
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
    """Refuse anything that is not a tolerance.

    Raises:
        ArgumentError: neither "auto" nor a number from 0 (exact) to below 1.

    Example:
        >>> check_row_tolerance(0.01)
    """
    if row_tolerance == "auto":
        return
    if isinstance(row_tolerance, str) or not 0 <= row_tolerance < 1:
        raise ArgumentError(
            f'row_tolerance: expected "auto" or a number from 0 (exact) to below 1, got {row_tolerance!r}'
        )
