"""GLIMPSE (arXiv 2506.18985): head weighting and adaptive layer propagation, in one sweep.

    G[h] = max(0, dP[h]) ∘ P[h]      w_h = softmax_h( ΣG[h] / Σ max(0, dP[h]) / λ )      E = rownorm( Σ_h w_h G[h] )
    γ_l  = ‖ Σ_h dP_l[h] ‖₁          s_l = softmax_l( λ_d·l )                            α_l = γ_l s_l / Z
    row ← e_{q*};   for l = L … 1:   row ← row + ½ α_l · row @ E_l                       Z = Σ_k γ_k s_k

(``propagation="identity"``: without the ½.) Z needs every layer's γ, and the sweep meets the top layer first. So it
carries the row as a polynomial in 1/Z: coefficient rows c_0 = e_{q*} and c_k ← c_k + ½ γ_l s_l · c_{k−1} @ E_l, and in
the end row = Σ_k c_k / Z^k. Rows of E sum to at most 1 and the α to 1, so what k > K would add is at most
½^{K+1} / (K+1)! and a little; K is the smallest for which that is below ``TRUNCATION``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import UnsupportedModelError
from ..sweep.descent import Descent, Walk
from ..sweep.forward import Sweep
from ..sweep.pruning import Ledger
from ..sweep.rows import LayerStep
from ..sweep.targets import Targets
from ._base import SweptMethod, row_dtype
from .chefer import row_times_relevancy
from .glimpse_options import PROPAGATIONS, GlimpseOptions
from .registry import MethodName


class Glimpse(SweptMethod):
    """The method on a teacher-forced pass over prompt and answer; every row uses the target's own gradient."""

    name: ClassVar[MethodName] = "glimpse"

    def __init__(
        self,
        targets: Targets,
        inputs: Mapping[str, Any],
        prompt_length: int | Sequence[int] | None = None,
        options: GlimpseOptions | None = None,
    ) -> None:
        super().__init__(targets, inputs, prompt_length, options)
        self.options = options or GlimpseOptions()

    def rows(self, sweep: Sweep) -> Tensor:
        if sweep.ranks.group is not None:
            raise UnsupportedModelError(
                "method 'glimpse' sums the heads of dP before it takes magnitudes, which heads on different ranks do "
                "not allow; load the model without a tensor-parallel plan, or use method 'chefer'"
            )
        self.compared = self.empty_rows(sweep) if self.compare else None
        return self.in_chunks(sweep)

    def descend(
        self, sweep: Sweep, scalars: Sequence[Tensor], slots: Sequence[Sequence[int]], tolerance: float, *, keep: bool
    ) -> tuple[Tensor, Ledger]:
        options, layers = self.options, len(sweep)
        start = self.targets.start_rows(slots, sweep.logits.device, row_dtype(sweep))
        if options.route == "one_sweep":
            walk = GlimpseWalk(options, layers, start, options.terms(layers))
        else:
            first = GlimpseWalk(options, layers, start, 0)
            for _ in self._layers(Descent(sweep, scalars, first, row_tolerance=tolerance, keep=True), layers):
                pass
            walk = GlimpseWalk(options, layers, start, 0, first)
        if self.compare:
            walk.chefer = start.clone()
        ledger = Ledger(self.traits.error_factors)
        for step in self._layers(Descent(sweep, scalars, walk, row_tolerance=tolerance, keep=keep), layers):
            ledger.count(step.selection, start)
            self.advanced(len(scalars), layers - options.lowest(layers))
        ledger.miss(walk.missing())
        if self.compared is not None and walk.chefer is not None:
            self.targets.scatter(walk.chefer, slots, self.compared)
        return walk.running(), ledger

    def _layers(self, descent: Descent, layers: int) -> Iterator[LayerStep]:
        """The layers that take part."""
        for step in descent:
            yield step
            if step.index == self.options.lowest(layers):
                return


class GlimpseWalk(Walk):
    """The running rows of one descent: the coefficients of a polynomial in 1/Z, or the rows themselves.

    Args:
        start: (B, n, S), e_{q*} of each target.
        terms: K; 0 for a descent that is after Z alone.
        whole: of a descent that has found Z.

    Attributes:
        chefer: (B, n, S) running rows of `chefer`, for comparison; None if they are not wanted.
    """

    one_by_one: ClassVar[bool] = True

    def __init__(
        self, options: GlimpseOptions, layers: int, start: Tensor, terms: int, whole: GlimpseWalk | None = None
    ) -> None:
        self._options = options
        self._priors = options.priors(layers)
        self._factor = PROPAGATIONS[options.propagation]
        self._coefficients = torch.stack([start, *[torch.zeros_like(start)] * terms], dim=2)  # (B, n, K+1, S)
        self._reached = [0] * start.shape[1]  # highest power of each slot so far
        # Z so far, in units of the largest γ·s so far: powers of γ itself would overflow; and the relevancy of the rows
        # that were left out, times γ·s of the layer that left them out.
        self._unit, self._total, self._left_out = (
            torch.zeros(start.shape[:2], dtype=start.dtype, device=start.device) for _ in range(3)
        )
        self._whole = whole
        self._start = start
        self.chefer: Tensor | None = None

    def identity(self) -> Tensor:
        """Return e_{q*} of each target: the rows of E sum to one."""
        return self._start

    def weights(self) -> Tensor | None:
        """Return `chefer`'s rows: the product of these may be taken along the way."""
        return self.chefer

    def running(self, part: slice = slice(None)) -> Tensor:
        """Return the rows (B, n, S), were the layer reached so far the lowest."""
        coefficients, total = self._coefficients[:, part], self._total[:, part]
        inverse = torch.where(total > 0, 1 / total, 0)
        powers = inverse[..., None] ** torch.arange(coefficients.shape[2], device=inverse.device)
        return (powers[..., None] * coefficients).sum(2)

    def missing(self) -> Tensor:
        """(B, n): what the rows that were left out would have added: rows of E sum to one."""
        inverse = 1 if self._whole is not None else torch.where(self._total > 0, 1 / self._total, 0)
        return self._factor * self._left_out * inverse

    def down(self, step: LayerStep, slots: slice) -> None:
        """Go through one layer, and with `chefer`'s rows too where they are wanted."""
        self._advance(step, slots)
        if self.chefer is not None:
            self.chefer = self.chefer.to(step.query.device)
            rows = self.chefer[:, slots]
            self.chefer[:, slots] = rows + row_times_relevancy(rows, step)

    def _advance(self, step: LayerStep, part: slice) -> None:
        """One layer further down, for the slots in ``part``."""
        device = step.query.device
        self._coefficients, self._unit, self._total, self._left_out = (
            tensor.to(device) for tensor in (self._coefficients, self._unit, self._total, self._left_out)
        )
        batch, terms = self._coefficients.shape[0], self._coefficients.shape[2] - 1
        row_sums, gradient_sums, norm = ops.glimpse_statistics(
            *(step.query, step.key, step.value, step.grad_output, step.logsumexp),
            domain=self._options.stats_domain,
            columns=step.columns,
            scale=step.scale,
            key_ranges=step.key_ranges,
        )
        gain = norm.view(batch, -1) * self._priors[step.index]  # γ·s
        unseen = torch.zeros_like(gain)
        if step.selection is not None:
            unseen = (self.running(part) * (step.selection.left_out().to(device) > 0)).sum(-1)
        if self._whole is not None:
            unit, total = self._whole._unit[:, part].to(device), self._whole._total[:, part].to(device)
            share = torch.where(total > 0, gain / unit / total, 0)  # α
            self._left_out[:, part] += share * unseen
            rows = self._coefficients[:, part]
            added = self._product(step, rows, row_sums, gradient_sums)
            self._coefficients[:, part] = rows + self._factor * share[..., None, None] * added
            return
        unit = self._unit[:, part].maximum(gain)
        shrunk = torch.where(unit > 0, self._unit[:, part] / unit, 1)
        relative = torch.where(unit > 0, gain / unit, 0)
        self._total[:, part] = self._total[:, part] * shrunk + relative
        self._left_out[:, part] = self._left_out[:, part] * shrunk + relative * unseen
        self._unit[:, part] = unit
        if terms == 0:
            return
        powers = shrunk[..., None] ** torch.arange(terms + 1, device=device)
        rows = self._coefficients[:, part] * powers[..., None]
        # After m layers there are m powers at most.
        reached = min(terms - 1, self._reached[part.start])
        added = self._product(step, rows[:, :, : reached + 1], row_sums, gradient_sums)
        rows[:, :, 1 : reached + 2] += self._factor * relative[..., None, None] * added
        self._coefficients[:, part] = rows
        self._reached[part] = [reached + 1] * len(self._reached[part])

    def _product(self, step: LayerStep, rows: Tensor, row_sums: Tensor, gradient_sums: Tensor) -> Tensor:
        """(B, g, K, S) rows @ E."""
        where_positive = torch.where(gradient_sums > 0, row_sums.sum(-1) / gradient_sums, 0)
        head_weights = (where_positive / self._options.head_temperature).softmax(-1)
        weights = step.at_rows(rows).view(step.query.shape[0], 1, rows.shape[2], -1)
        product = ops.glimpse_product(
            *(step.query, step.key, step.value, step.grad_output, step.logsumexp, weights, head_weights, row_sums),
            scale=step.scale,
            key_ranges=step.key_ranges,
        )
        return product.view_as(rows)
