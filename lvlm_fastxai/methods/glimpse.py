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

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ArgumentError, UnsupportedModelError
from ..ops.glimpse_statistics import DOMAINS, Domain
from ..sweep.descent import LayerStep, Sweep
from ..sweep.pruning import Ledger
from ..sweep.targets import Targets
from ._base import Method, product_of, row_dtype, weights_of

# What cutting the polynomial in 1/Z off may cost of a row of length 1.
TRUNCATION = 1e-6
# λ_d was tuned on a backbone with this many layers; "scaled" keeps the prior's shape over all layers.
TUNED_LAYERS = 64

PROPAGATIONS = {"literal": 0.5, "identity": 1.0}  # how much of α_l a layer adds
ROUTES = ("one_sweep", "two_sweeps")


@dataclass(frozen=True)
class GlimpseOptions:
    """The choices that GLIMPSE (arXiv 2506.18985) leaves, and two of ours.

    Attributes:
        propagation: "literal", Π (2I + α_l E_l) as the paper writes it, whose common factor 2^L is left out; or
            "identity", Π (I + α_l E_l).
        stats_domain: where dP is summed for w and γ: "full", over all columns of the sample as published code does,
            although no row sees the columns after it, or "causal", over the columns that a row sees.
        head_temperature: λ of the softmax over heads, above 0.
        depth_rate: λ_d of the prior over layers; "scaled" is 0.2·64/L for L layers.
        layers: "all", or "top:F" with 0 < F ≤ 1: the share F of the layers, counted from the top; the others are left
            out of the product, and of the backward.
        route: "one_sweep", or "two_sweeps": the first for Z alone. Twice the time; the referee of the other.

    Raises:
        ArgumentError: a value is none of these.

    Example:
        >>> GlimpseOptions(layers="top:0.6").lowest(10)
        4
    """

    propagation: str = "literal"
    stats_domain: Domain = "full"
    head_temperature: float = 0.5
    depth_rate: float | str = 0.2
    layers: str = "all"
    route: str = "one_sweep"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("propagation", tuple(PROPAGATIONS)),
            ("stats_domain", DOMAINS),
            ("route", ROUTES),
        ):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not _is_finite(self.head_temperature) or self.head_temperature <= 0:
            raise ArgumentError(f"head_temperature: expected a number above 0, got {self.head_temperature!r}")
        if self.depth_rate != "scaled" and not _is_finite(self.depth_rate):
            raise ArgumentError(f'depth_rate: expected a number or "scaled", got {self.depth_rate!r}')
        if not 0 < self._share <= 1:
            raise ArgumentError(f'layers: expected "all" or "top:F" with 0 < F ≤ 1, got {self.layers!r}')

    @property
    def _share(self) -> float:
        if self.layers == "all":
            return 1.0
        head, _, share = str(self.layers).partition(":")
        try:
            return float(share) if head == "top" else math.nan
        except ValueError:
            return math.nan

    def lowest(self, layers: int) -> int:
        """Index of the lowest of the layers that take part."""
        return layers - max(1, round(self._share * layers))

    def priors(self, layers: int) -> list[float]:
        """s_l of every layer, bottom first, but for a common factor, which Z takes out again; the largest is 1."""
        rate = 0.2 * TUNED_LAYERS / layers if self.depth_rate == "scaled" else float(self.depth_rate)
        top = max(0.0, rate * (layers - 1))
        return [math.exp(rate * index - top) for index in range(layers)]

    def terms(self, layers: int) -> int:
        """K: how many powers of 1/Z are carried; each layer gives one at most."""
        factor = PROPAGATIONS[self.propagation]
        enough = next(k for k in itertools.count(1) if factor ** (k + 1) / math.factorial(k + 1) < TRUNCATION)
        return min(enough, layers - self.lowest(layers))


class Glimpse(Method):
    """The method on a teacher-forced pass over prompt and answer; every row uses the target's own gradient.

    Attributes:
        compare: whether ``compared``, the rows of `chefer`, is wanted too; they come of the same backward.
    """

    name: ClassVar[str] = "glimpse"
    options_type: ClassVar[type | None] = GlimpseOptions
    # `python -m benchmarks pruned calibrate --method glimpse`
    estimate: ClassVar[tuple[float, float]] = (1.9, 1.2)
    # A tolerance of 0.01 is estimated to cost more than the rounding of a bf16 model hides.
    prunes_by_itself: ClassVar[bool] = False

    def __init__(
        self,
        targets: Targets,
        inputs: Mapping[str, Any],
        prompt_length: int | Sequence[int] | None = None,
        options: GlimpseOptions | None = None,
    ) -> None:
        super().__init__(targets, inputs, prompt_length, options)
        self.options = options or GlimpseOptions()
        self.compare = False

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
            rows = _Rows(options, layers, start, options.terms(layers))
        else:
            first = _Rows(options, layers, start, 0)
            for _ in self._layers(sweep, first, scalars, tolerance, keep=True):
                pass
            rows = _Rows(options, layers, start, 0, first)
        ledger = Ledger(self.estimate)
        for step in self._layers(sweep, rows, scalars, tolerance, keep=keep):
            ledger.count(step.selection, start)
            self.advanced(len(scalars), layers - options.lowest(layers))
        ledger.miss(rows.missing())
        if self.compared is not None:
            self.targets.scatter(rows.chefer, slots, self.compared)
        return rows.row(), ledger

    def _layers(
        self, sweep: Sweep, rows: _Rows, scalars: Sequence[Tensor], tolerance: float, *, keep: bool
    ) -> Iterator[LayerStep]:
        """The layers that take part, with ``rows`` advanced through each."""

        def each(step: LayerStep, part: slice) -> None:
            rows.advance(step, part)
            if self.compared is not None:
                rows.advance_chefer(step, part)

        along = None if self.compared is None else lambda: rows.chefer
        for step in sweep.descend(
            scalars,
            keep=keep,
            each=each,
            row_tolerance=tolerance,
            relevancy=rows.row,
            own=rows.start,
            along=along,
        ):
            yield step
            if step.index == self.options.lowest(len(sweep)):
                return


class _Rows:
    """The running rows of one descent: the coefficients of a polynomial in 1/Z, or the rows themselves.

    Args:
        start: (B, n, S), e_{q*} of each target.
        terms: K; 0 for a descent that is after Z alone.
        whole: of a descent that has found Z.
    """

    def __init__(
        self, options: GlimpseOptions, layers: int, start: Tensor, terms: int, whole: _Rows | None = None
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
        self.start = start
        self.chefer = start.clone()

    def row(self, part: slice = slice(None)) -> Tensor:
        """(B, n, S): the rows, were the layer reached so far the lowest."""
        coefficients, total = self._coefficients[:, part], self._total[:, part]
        inverse = torch.where(total > 0, 1 / total, 0)
        powers = inverse[..., None] ** torch.arange(coefficients.shape[2], device=inverse.device)
        return (powers[..., None] * coefficients).sum(2)

    def missing(self) -> Tensor:
        """(B, n): what the rows that were left out would have added: rows of E sum to one."""
        inverse = 1 if self._whole is not None else torch.where(self._total > 0, 1 / self._total, 0)
        return self._factor * self._left_out * inverse

    def advance(self, step: LayerStep, part: slice) -> None:
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
            unseen = (self.row(part) * (step.selection.left_out().to(device) > 0)).sum(-1)
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

    def advance_chefer(self, step: LayerStep, part: slice) -> None:
        """`chefer`'s rows one layer further down."""
        self.chefer = self.chefer.to(step.query.device)
        rows = self.chefer[:, part]
        self.chefer[:, part] = rows + product_of(rows, step)

    def _product(self, step: LayerStep, rows: Tensor, row_sums: Tensor, gradient_sums: Tensor) -> Tensor:
        """(B, g, K, S) rows @ E."""
        where_positive = torch.where(gradient_sums > 0, row_sums.sum(-1) / gradient_sums, 0)
        head_weights = (where_positive / self._options.head_temperature).softmax(-1)
        weights = weights_of(rows, step).view(step.query.shape[0], 1, rows.shape[2], -1)
        product = ops.glimpse_product(
            *(step.query, step.key, step.value, step.grad_output, step.logsumexp, weights, head_weights, row_sums),
            scale=step.scale,
            key_ranges=step.key_ranges,
        )
        return product.view_as(rows)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
