"""The explained logits: checked, and grouped so that samples share a backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError


@dataclass(frozen=True)
class Targets:
    """N explained logits of a batch of B samples × S columns: ``samples``, ``query_rows`` and ``token_ids``, N long."""

    samples: tuple[int, ...]
    query_rows: tuple[int, ...]
    token_ids: tuple[int, ...]
    batch: int
    columns: int

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def slots(self) -> list[list[int]]:
        """Targets that can share one backward: at most one of each sample, since samples never mix in a model."""
        slots: list[list[int]] = []
        seen = [0] * self.batch
        for target, sample in enumerate(self.samples):
            if seen[sample] == len(slots):
                slots.append([])
            slots[seen[sample]].append(target)
            seen[sample] += 1
        return slots

    @cached_property
    def rows_of_samples(self) -> list[list[int]]:
        """The different query rows of each sample, ascending."""
        rows: list[set[int]] = [set() for _ in range(self.batch)]
        for sample, row in zip(self.samples, self.query_rows, strict=True):
            rows[sample].add(row)
        return [sorted(sample_rows) for sample_rows in rows]

    def row_table(self) -> Tensor:
        """(B, R) int64 query rows whose logits the model computes; short samples are filled up with their first row."""
        width = max(len(rows) for rows in self.rows_of_samples)
        return torch.tensor(
            [(rows + rows[:1] * width)[:width] if rows else [0] * width for rows in self.rows_of_samples]
        )

    def select(self, logits: Tensor, rows_of_samples: list[list[int]] | None = None) -> Tensor:
        """(N, V) logits of the targets' rows, fp32 or fp64, out of (B, R, V).

        Args:
            logits: computed at the rows of a :meth:`row_table`.
            rows_of_samples: of the targets whose table that was; these targets' own by default.
        """
        table = self.rows_of_samples if rows_of_samples is None else rows_of_samples
        places = [table[sample].index(row) for sample, row in zip(self.samples, self.query_rows, strict=True)]
        rows = logits[list(self.samples), places]
        return rows if rows.dtype == torch.float64 else rows.float()

    def scalars(self, logits: Tensor) -> list[Tensor]:
        """One scalar per slot: the sum of its targets' raw logits.

        Raises:
            ArgumentError: a logit is NaN or infinite.
        """
        values = self.select(logits).gather(1, torch.tensor(self.token_ids, device=logits.device)[:, None])[:, 0]
        finite = torch.isfinite(values.detach())
        if not bool(finite.all()):
            wrong = int((~finite).nonzero()[0, 0])
            logit = float(values.detach()[wrong])
            raise ArgumentError(
                f"targets[{wrong}]: the model's logit of token {self.token_ids[wrong]} at row {self.query_rows[wrong]} "
                f"of sample {self.samples[wrong]} is {logit}; an explanation needs finite logits"
            )
        return [values[slot].sum() for slot in self.slots]

    def start_rows(self, slots: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, n, S): e_{q*} of each target in its slot; zero where a sample has no target in a slot."""
        row = torch.zeros(self.batch, len(slots), self.columns, dtype=dtype, device=device)
        for number, slot in enumerate(slots):
            for target in slot:
                row[self.samples[target], number, self.query_rows[target]] = 1
        return row

    def scatter(self, rows: Tensor, slots: Sequence[Sequence[int]], into: Tensor) -> None:
        """Write the (B, n, S) rows of ``slots`` to their places in ``into`` (N, S)."""
        for number, slot in enumerate(slots):
            for target in slot:
                into[target] = rows[self.samples[target], number].to(into)


def check_targets(targets: Any, inputs: dict[str, Any], vocabulary: int | None) -> Targets:
    """Validate (sample, query_row, token_id) triples against the batch.

    Args:
        targets: (N, 3) integer tensor, or a sequence of triples.
        inputs: keyword arguments of ``model.forward`` with ``input_ids`` or ``inputs_embeds`` and maybe
            ``attention_mask`` (B, S).
        vocabulary: number of tokens, or None if unknown.

    Raises:
        ArgumentError: empty or malformed targets, an index out of range, or a row that is padding.
    """
    shaped = inputs.get("input_ids")
    if shaped is None:
        shaped = inputs.get("inputs_embeds")
    if not isinstance(shaped, Tensor) or shaped.dim() < 2:
        raise ArgumentError("inputs: expected `input_ids` (B, S) or `inputs_embeds` (B, S, D)")
    batch, columns = shaped.shape[:2]
    if isinstance(targets, Tensor):
        if targets.is_floating_point() or targets.dim() != 2 or targets.shape[1] != 3:
            raise ArgumentError(
                f"targets: expected an (N, 3) integer tensor, got {tuple(targets.shape)} {targets.dtype}"
            )
        targets = targets.tolist()
    try:
        triples = [tuple(int(number) for number in target) for target in targets]
    except (TypeError, ValueError):
        raise ArgumentError(f"targets: expected (sample, query_row, token_id) triples, got {targets!r}") from None
    if not triples:
        raise ArgumentError("targets: expected at least one (sample, query_row, token_id), got none")
    mask = inputs.get("attention_mask")
    real = mask.detach().bool().tolist() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for index, triple in enumerate(triples):
        if len(triple) != 3:
            raise ArgumentError(f"targets[{index}]: expected (sample, query_row, token_id), got {triple}")
        for name, value, limit in zip(
            ("sample", "query_row", "token_id"), triple, (batch, columns, vocabulary), strict=True
        ):
            if value < 0 or (limit is not None and value >= limit):
                raise ArgumentError(
                    f"targets[{index}]: {name} {value} is out of range, expected 0 … {(limit or 0) - 1}"
                )
        if real is not None and not real[triple[0]][triple[1]]:
            raise ArgumentError(f"targets[{index}]: query_row {triple[1]} of sample {triple[0]} is padding")
    samples, rows, tokens = zip(*triples, strict=True)
    return Targets(samples, rows, tokens, batch, columns)
