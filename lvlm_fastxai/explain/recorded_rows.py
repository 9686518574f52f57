"""Relevancy rows from what ``generate()`` computed, checked against the logits that it chose its tokens by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, UnsupportedModelError
from ..methods.registry import MethodTraits
from ..models.decoder import unwrap
from ..sweep.forward import Recording
from ..sweep.pruning import plan_sweep
from ..sweep.recording import Recorder, logits_agree
from ..sweep.sharding import find_ranks
from .peak_memory import peak_memory
from .relevancy_rows import RelevancyRows


@dataclass(frozen=True)
class MeasuredRows:
    """Rows, and the seconds and bytes that they took; the bytes None where they cannot be read."""

    found: RelevancyRows
    seconds: float
    peak_bytes: int | None


Targets = list[tuple[int, int, int]]
Explain = Callable[..., RelevancyRows]


def make_recorder(
    model: Any, traits: MethodTraits, memory: str, row_tolerance: float | str, inputs: Mapping[str, Any]
) -> Recorder | None:
    """Make what keeps the pass of ``generate()`` for the sweep; None where that saves nothing.

    Args:
        model: that generates.
        traits: of the method.
        memory, row_tolerance: of the sweep.
        inputs: of the prompt.
    """
    if not traits.sweeps:
        return None
    plan = plan_sweep(
        row_tolerance,
        memory,
        model.dtype,
        inputs["input_ids"].shape[1],
        needs_gradient=traits.needs_gradient,
        prunes_by_itself=traits.prunes_by_itself,
    )
    if not plan.records:
        return None
    try:
        return Recorder(model)
    except UnsupportedModelError:
        return None


def measure(compute: Callable[[], RelevancyRows], device: torch.device, recording: Recording | None) -> MeasuredRows:
    """Compute rows, and measure what they take; the recording that they start from counts.

    Raises:
        ArgumentError: logits or rows are not finite.
    """
    started = time.perf_counter()
    with peak_memory(device) as peak:
        found = compute()
    seconds = time.perf_counter() - started
    if not bool(torch.isfinite(found.logits).all() and torch.isfinite(found.rows).all()):
        raise ArgumentError("model: logits or relevancy are NaN or infinite; check the weights and the dtype")
    kept = 0 if recording is None else recording.nbytes
    return MeasuredRows(found, seconds, None if peak.bytes is None else peak.bytes + kept)


def explain_from_recording(
    explain: Explain,
    model: Any,
    inputs: Mapping[str, Any],
    targets: Targets,
    *,
    prompt_length: int,
    recording: Recording | None,
    chosen_by: Tensor | None,
    all_columns: bool,
) -> RelevancyRows:
    """Start from the recording where that gives the same rows, and from a forward pass where it does not.

    Args:
        explain: `explain_rows` with everything but inputs, targets and recording.
        model: that ``generate()`` ran.
        inputs: prompt and answer joined, one sample.
        targets: (0, query_row, token_id) triples.
        prompt_length: column at which the answer starts.
        recording: of the ``generate()`` call; None where there is none.
        chosen_by: (steps, V) fp32 logits of that call.
        all_columns: whether the method sums over columns that no row sees.
    """
    columns = inputs["input_ids"].shape[1]
    # An answer cut at its longest has a last token that `generate` chose but never read. No row depends on it, but
    # where gradients are summed over all columns.
    cut = recording is not None and recording.columns < columns
    if recording is None or chosen_by is None or (cut and all_columns):
        return explain(inputs, targets)
    read = {
        name: value[:, : recording.columns] if isinstance(value, Tensor) and value.shape == (1, columns) else value
        for name, value in inputs.items()
    }
    steps = [row - prompt_length + 1 for _, row, _ in targets]
    result = explain(read, targets, recording=recording)
    token_ids = torch.tensor([token for _, _, token in targets])
    own = chosen_by[steps].gather(1, token_ids[:, None])[:, 0]
    agree = logits_agree(result.logits, own, chosen_by[steps].abs().max(), model.dtype)
    ranks = find_ranks(unwrap(model), model.config.get_text_config())
    if not bool(ranks.agree(torch.tensor([agree]))):
        return explain(inputs, targets)
    missing = (0, columns - recording.columns)
    compared = None if result.compared is None else nn.functional.pad(result.compared, missing)
    return replace(result, rows=nn.functional.pad(result.rows, missing), compared=compared)
