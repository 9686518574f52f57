"""Which rows of a layer a pruned sweep keeps, and how a decoder layer is called on those rows alone.

Gradients at a decoder layer's output sit on few rows. At every layer the sweep keeps the smallest set of rows that
holds a share 1 − ε (``row_tolerance`` ε) of

    n_i / Σ_j n_j  +  RELEVANCY_WEIGHT · row_i n_i / Σ_j row_j n_j        n_i = ‖∂z/∂h_i‖₂, row the running relevancy

The first term is what row i carries to the layers below, the second what it adds to the map in this one. A row that is
left out of a layer is not left out of the sweep: its gradient goes past the layer on the residual connection, and may
be kept further down. Attention still sees every key and value, so dK and dV reach all positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# `row_tolerance="auto"` tries these in turn, and sweeps exactly where none of them is estimated to be good enough.
AUTO_TOLERANCES = (0.01,)
# The estimated error that "auto" allows: about half of what a dense sweep in the dtype loses to rounding, which for
# bf16 is 2.0e-2 (median of 144 targets of three models). At this limit none of the 109 targets that were swept at these
# tolerances erred more than its own dense bf16 sweep (benchmarks/results/pruned.json). In fp32 rounding costs 1e-6,
# which no pruning reaches; fp16 was not measured.
ROUNDING_ERROR = {torch.bfloat16: 1e-2}
# Below this length most rows matter: pruning would save nothing.
SHORTEST_PRUNED = 128

# What a row adds to the map counts so much more than what it carries down. For bf16's own error at S = 384, seven
# targets keep 11 % of the rows without it and 6.6 % with it; 1 and 15 keep 7.3 and 6.6 % (`python -m benchmarks pruned
# weights`).
RELEVANCY_WEIGHT = 5.0

# The error estimate of the methods that do not normalise the rows of their layers, calibrated by `python -m benchmarks
# pruned`.
MISSING_FACTOR = 1.7
DROPPED_FACTOR = 0.13

# From this share of rows on, a layer costs less whole than its kept rows recomputed one by one.
WHOLE_LAYER_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Selection:
    """rows (B,N,n) int64, ascending · counts (B,N) how many of them each target needs · norms (B,N,S) fp32 of all rows.

    ``counts`` ≤ n: sets are filled up to the largest.
    """

    rows: Tensor
    counts: Tensor
    norms: Tensor

    def left_out(self) -> Tensor:
        """(B, N, S) the norms with zeros at the kept rows."""
        return self.norms.scatter(2, self.rows.to(self.norms.device), 0.0)


def select_rows(
    norms: Tensor,
    tolerance: float,
    *,
    relevancy: Tensor | None = None,
    own: Tensor | None = None,
    shared: bool = False,
) -> Selection:
    """Smallest sets of rows that hold a share 1 − ``tolerance`` of each target's score (see above).

    Every set is filled up with the next largest rows to the size n of the largest one, so that one tensor holds all.

    Args:
        norms: (B, N, S) Euclidean norms of the gradient rows, not negative.
        tolerance: ε, 0 ≤ ε < 1; 0 keeps every row whose gradient is not zero.
        relevancy: (B, N or 1, S) the running rows, not negative; None: gradient norms alone are the score.
        own: (B, N, S), 1 at each target's query row and 0 elsewhere, for a method that normalises the rows of its
            layers: what a row adds to the map is then row_i, whatever its gradient's norm, and takes norm_i·row_i's
            place in the score. Identity entries are left out, and the query rows always kept.
        shared: one set for all targets of a sample: the union of theirs.

    Returns:
        Selection: with at least one row per target.
    """
    norms = norms.float()
    # fp64: a share of 1e-6 of the norm must not drown in the rounding of the sum.
    scores = _shares(norms.double())
    highest = 2 * (1 + RELEVANCY_WEIGHT)
    if relevancy is not None and own is None:
        scores = scores + RELEVANCY_WEIGHT * _shares(norms.double() * relevancy.to(norms.device))
    if relevancy is not None and own is not None:
        own = own.to(norms.device)
        added = (relevancy.to(norms.device) - own).double() * (norms > 0)
        scores = (scores + RELEVANCY_WEIGHT * _shares(added)) * (1 - own)
    ordered, order = (scores if own is None else scores + highest * own).sort(dim=-1, descending=True, stable=True)
    if own is not None:
        ordered = scores.gather(-1, order)
    held = ordered.cumsum(-1)
    counts = ((held < (1 - tolerance) * held[..., -1:]).sum(-1) + 1).clamp(max=norms.shape[-1])
    if tolerance == 0:
        counts = (ordered > 0).sum(-1).clamp(min=1) if own is None else (ordered > 0).sum(-1) + 1
    if shared:
        position = torch.arange(norms.shape[-1], device=norms.device)
        wanted = torch.zeros_like(scores).scatter(2, order, (position < counts[..., None]).to(scores.dtype))
        wanted = wanted.amax(1, keepdim=True)  # (B, 1, S)
        # Wanted rows first; among the others the next largest, for filling up.
        order = (highest * wanted + scores.amax(1, keepdim=True)).argsort(dim=-1, descending=True, stable=True)
        order = order.expand_as(norms)
        counts = wanted.sum(-1).long().expand_as(counts)
    rows = order[..., : int(counts.max())].sort(dim=-1).values
    return Selection(rows, counts, norms)


def _shares(values: Tensor) -> Tensor:
    """Of each entry in the sum over the last axis; zeros where that is zero."""
    return values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """(B, S, …) and rows (B, N, n) to (B·N, n, …)."""
    rows = rows.to(tensor.device)  # a layer's input may be on another device than its output
    sample = torch.arange(len(rows), device=rows.device)[:, None, None]
    return tensor[sample, rows].flatten(0, 1)


def rows_of_call(kwargs: Mapping[str, Any], rows: Tensor, columns: int) -> dict[str, Any]:
    """The keyword arguments of a decoder layer's call on all rows, for a call on ``rows`` (B, N, n) as B·N samples.

    ``position_embeddings`` (tensors (…, B or 1, S, d)) and ``position_ids`` ((…, B or 1, S)) are what transformers
    hands a layer per row. The mask stays as it is: the attention reads the rows' key ranges from its tape.
    """

    def gather(value: Any, trailing: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(gather(item, trailing) for item in value)
        if not isinstance(value, Tensor) or value.dim() < 1 + trailing or value.shape[-1 - trailing] != columns:
            return value
        axis = value.dim() - 1 - trailing
        if axis == 0:  # (S,): the same for all samples
            return value[rows.flatten(0, 1).to(value.device)]
        lead = value.movedim((axis - 1, axis), (0, 1))  # (B or 1, S, …)
        if lead.shape[0] == 1:
            lead = lead.expand(rows.shape[0], *lead.shape[1:])
        return take_rows(lead, rows).movedim((0, 1), (axis - 1, axis))

    called = dict(kwargs)
    for name, trailing in (("position_embeddings", 1), ("position_ids", 0)):
        if name in called:
            called[name] = gather(called[name], trailing)
    return called


def reason_against(args: tuple[Any, ...], kwargs: Mapping[str, Any], columns: int) -> str | None:
    """Why a layer cannot be called on a part of its rows; None if it can."""
    known = {"attention_mask", "position_embeddings", "position_ids", "cache_position"}
    for name, value in [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]:
        parts = value if isinstance(value, tuple | list) else [value]
        for part in parts:
            if name not in known and isinstance(part, Tensor) and columns in part.shape:
                return f"its {name} has an entry for each row that is not known to this version"
    return None


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do.

    Attributes:
        tolerances: ε to try in turn; the last one is taken whatever its error is estimated to be.
        records: whether it starts from what ``generate()`` computed, where an answer is generated.
    """

    tolerances: tuple[float, ...]
    records: bool


def plan_sweep(
    row_tolerance: float | str,
    memory: str,
    dtype: torch.dtype,
    columns: int,
    *,
    needs_gradient: bool,
    prunes_by_itself: bool,
) -> SweepPlan:
    """Decide what ``row_tolerance="auto"`` means, and whether a recording saves a forward.

    "auto" prunes where the rounding of the dtype hides what is left out, in sequences that are long enough to gain from
    it. Without gradients there is nothing to prune, and no sweep. "min" takes a forward of its own, because a recording
    would stand in the device's memory while the answer is generated. The other modes start from a recording: they
    compute each layer's activations when they first come down to it, and the vision tower does not run again.

    Args:
        row_tolerance: ε ≥ 0, or "auto".
        memory: "fast", "lean" or "min".
        dtype: of the model.
        columns: S.
        needs_gradient, prunes_by_itself: traits of the method (`lvlm_fastxai.methods.registry`).

    Example:
        >>> plan_sweep("auto", "fast", torch.bfloat16, 1000, needs_gradient=True, prunes_by_itself=True)
        SweepPlan(tolerances=(0.01, 0.0), records=True)
        >>> plan_sweep("auto", "fast", torch.float32, 1000, needs_gradient=True, prunes_by_itself=True)
        SweepPlan(tolerances=(0.0,), records=True)
    """
    if not needs_gradient:
        return SweepPlan((0.0,), records=False)
    tolerances: tuple[float, ...] = (0.0,)
    if not isinstance(row_tolerance, str):
        tolerances = (float(row_tolerance),)
    elif prunes_by_itself and dtype in ROUNDING_ERROR and columns >= SHORTEST_PRUNED:
        tolerances = (*AUTO_TOLERANCES, 0.0)
    return SweepPlan(tolerances, records=memory != "min")


@dataclass(frozen=True)
class Certificate:
    """What a pruned sweep kept of each of N targets, layer by layer (L), bottom layer first.

    Attributes:
        rows_kept: (N, L) int64, rows of each layer that took part; S where a layer was swept whole.
        dropped: (N, L) fp32, share of the gradient norm at each layer's output whose rows were left out of the layer.
        error: (N,) fp32, estimated relative L1 error of the row without its self entry; 0 where nothing was left out.
            The true error was below it in 98 % of the cases it was calibrated on (docs/pruned-sweep.md).
    """

    rows_kept: Tensor
    dropped: Tensor
    error: Tensor


class Ledger:
    """Collects a :class:`Certificate` while a method walks down, for (B, N) rows at a time.

    Args:
        factors: of the error estimate; calibrated for each method.
    """

    def __init__(self, factors: tuple[float, float]) -> None:
        self._factors = factors
        self._kept: list[Tensor] = []
        self._dropped: list[Tensor] = []
        self._missing: Tensor | float = 0.0  # on the host: the row moves with a model that is spread over devices

    def enter(self, selection: Selection | None, row: Tensor, product: Tensor) -> None:
        """One layer: what it kept, the (B, N, S) rows before it and what it added to them.

        The relevancy that row i adds is taken to be in proportion to row_i·‖∂z/∂h_i‖: what the kept rows added, times
        the left-out rows' part in that product over the kept rows' part.
        """
        self.count(selection, row)
        if selection is None:
            return
        norms, left = selection.norms.to(row.device), selection.left_out().to(row.device)
        lost, all_of_it = (row * left).sum(-1), (row * norms).sum(-1)
        kept = all_of_it - lost
        self.miss(torch.where(kept > 0, product.sum(-1) * lost / kept, 0.0))

    def count(self, selection: Selection | None, row: Tensor) -> None:
        """What one layer kept, and what it dropped of the gradient's norm, for (B, N, S) rows."""
        if selection is None:
            self._kept.append(torch.full(row.shape[:2], row.shape[2]))
            self._dropped.append(torch.zeros(row.shape[:2]))
            return
        norms, left = selection.norms.to(row.device), selection.left_out().to(row.device)
        self._kept.append(torch.full(row.shape[:2], selection.rows.shape[-1]))
        total = norms.sum(-1)
        share = torch.where(total > 0, left.sum(-1) / total, 0.0)
        self._dropped.append(share.expand(row.shape[:2]).cpu())

    def miss(self, relevancy: Tensor) -> None:
        """(B, N) relevancy that the left-out rows would have added themselves."""
        self._missing = self._missing + relevancy.cpu()

    def close(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, L) rows kept, (B, N, L) share dropped, (B, N) estimated error, for the finished (B, N, S) rows."""
        added = row.sum(-1).cpu() - 1
        missing = self._missing / added.clamp(min=torch.finfo(row.dtype).tiny)
        dropped = torch.stack(self._dropped[::-1], -1)
        estimate = estimated_error(missing.float(), dropped.mean(-1), self._factors)
        return torch.stack(self._kept[::-1], -1), dropped, estimate


def estimated_error(missing: Tensor, dropped: Tensor, factors: tuple[float, float]) -> Tensor:
    """Upper estimate of a pruned row's relative L1 error.

    Args:
        missing: relevancy that the left-out rows would have added themselves, as a share of the row (first order).
        dropped: share of the gradient norm that was left out, mean over layers.
        factors: what each of the two counts, calibrated.
    """
    return factors[0] * missing + factors[1] * dropped
