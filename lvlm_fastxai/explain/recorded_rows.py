"""Relevancy rows from what ``generate()`` computed, checked against the logits that it chose its tokens by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import unwrap
from ..sweep.forward import Recording
from ..sweep.recording import logits_agree
from ..sweep.sharding import find_ranks
from .relevancy_rows import RelevancyRows

Targets = list[tuple[int, int, int]]
Explain = Callable[..., RelevancyRows]


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
