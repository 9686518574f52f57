"""LVLM-Interpret's generation-time maps (Stan et al., 2024), reproduced on one teacher-forced pass.

That tool takes a backward for every generated token while it generates. For token k it keeps the prompt rows of Ā from
the first token's backward, takes row S0+j−1 from token j's, and normalises the one row of the product. So the product
of token k is ``chefer``'s with the gradient

    dÕ_i = dO_i of token 0's backward             for i < S0
    dÕ_i = dO_i of token (i − S0 + 1)'s own        for S0 ≤ i ≤ q*

which is the same for every token of one answer: all N rows share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..sweep.forward import Sweep
from ..sweep.pruning import Ledger
from ..sweep.targets import Targets
from .chefer import Chefer, CheferWalk
from .registry import MethodName


class JoinedWalk(CheferWalk):
    """`chefer`'s rows, every one by the same gradient: each row's from the token whose own it is."""

    joins: ClassVar[bool] = True

    def __init__(self, start: Tensor, sweep: Sweep, ledger: Ledger, explained: Targets) -> None:
        super().__init__(start, ledger, sweep.ranks)
        self._explained = explained

    def join(self, layer: int, grad_outputs: list[Tensor], rows: Tensor | None) -> Tensor:
        joined = grad_outputs[0].clone()
        for number, slot in enumerate(self._explained.slots[1:], start=1):
            for token in slot:
                sample, row = self._explained.samples[token], self._explained.query_rows[token]
                # The slots share their rows, the union of what each keeps.
                at = row if rows is None else rows[sample] == row
                joined[sample, :, at] = grad_outputs[number][sample, :, at]
        return joined[:, None]

    def running(self) -> Tensor:
        """Return the mean of the rows: a gradient that the slots share belongs to none of them."""
        return self.row.mean(1, keepdim=True)

    def weights(self) -> None:
        """Return None: the joined gradient is known after all slots' backwards only."""


class LvlmInterpret(Chefer):
    """The tool's maps, its two post-steps included. Needs ``prompt_length`` S0: the answer starts at that column."""

    name: ClassVar[MethodName] = "lvlm_interpret"

    def __init__(
        self,
        targets: Targets,
        inputs: Mapping[str, Any],
        prompt_length: int | Sequence[int] | None = None,
        options: None = None,
    ) -> None:
        super().__init__(targets, inputs, prompt_length, options)
        if prompt_length is None:
            raise ArgumentError("prompt_length: method 'lvlm_interpret' needs the column at which the answer starts")
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise ArgumentError("inputs: method 'lvlm_interpret' needs `input_ids` (B, S)")
        starts = [prompt_length] * targets.batch if isinstance(prompt_length, int) else list(prompt_length)
        if len(starts) != targets.batch or not all(1 <= start <= targets.columns for start in starts):
            raise ArgumentError(
                f"prompt_length: expected an integer in 1 … {targets.columns}, or one for each of the "
                f"{targets.batch} samples, got {prompt_length}"
            )
        # Every answer token up to the last explained one needs a backward, whether it is explained itself or not.
        chain: list[tuple[int, int, int]] = []
        sequences = input_ids.tolist()
        for index, (sample, row, token) in enumerate(
            zip(targets.samples, targets.query_rows, targets.token_ids, strict=True)
        ):
            if row < starts[sample] - 1:
                raise ArgumentError(
                    f"targets[{index}]: query_row {row} is inside the prompt; method 'lvlm_interpret' explains "
                    f"generated tokens, rows {starts[sample] - 1} and up"
                )
            if row + 1 == targets.columns:
                sequences[sample] = [*sequences[sample][: row + 1], token]
            elif sequences[sample][row + 1] != token:
                raise ArgumentError(
                    f"targets[{index}]: token {token} was not generated at row {row} (the sequence continues with "
                    f"{sequences[sample][row + 1]}); method 'lvlm_interpret' explains generated tokens"
                )
        for sample, rows in enumerate(targets.rows_of_samples):
            chain += [
                (sample, row, sequences[sample][row + 1])
                for row in range(starts[sample] - 1, max(rows, default=-1) + 1)
            ]
        samples, query_rows, token_ids = zip(*chain, strict=True)
        self.explained = Targets(samples, query_rows, token_ids, targets.batch, targets.columns)

    def rows(self, sweep: Sweep) -> Tensor:
        targets, result = self.targets, self.empty_rows(sweep)
        row = self.swept(sweep, self.explained.scalars(sweep.logits), targets.slots)
        targets.scatter(row, targets.slots, result)
        return normalise(result, targets)

    def walk(self, start: Tensor, sweep: Sweep) -> CheferWalk:
        return JoinedWalk(start, sweep, Ledger(self.traits.error_factors), self.explained)


def normalise(rows: Tensor, targets: Targets) -> Tensor:
    """The tool's post-steps: take the self entry out, divide by the sum (1 if it is zero), put the self entry back."""
    index = torch.arange(len(targets), device=rows.device)
    own = torch.tensor(targets.query_rows, device=rows.device)
    rows[index, own] -= 1
    total = rows.sum(1, keepdim=True)
    rows = rows / torch.where(total == 0, 1, total)
    rows[index, own] += 1
    return rows
