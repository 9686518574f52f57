"""One map for a whole answer: the token weights and response-level maps of GLIMPSE (arXiv 2506.18985)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..choices import Weighting
from ..errors import ArgumentError

# What a token's weight is made of; the last three are ablations of the paper.
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


@dataclass(frozen=True)
class Aggregate:
    """A whole answer's maps and the weights of its N tokens that made them.

    Attributes:
        image_map: (I,) M_V = Σ_t β_t^V R(t, V), one value per image column.
        prompt_map: (P,) M_P = Σ_t β_t^P R(t, P), one value per prompt column.
        confidence: (N,) p_t, the token's probability.
        prompt_alignment: (N,) a_t = mean_{i∈P} R(t, i).
        visual_grounding: (N,) v_t = mean_{i∈V} R(t, i).
        image_weights: (N,) β_t^V = p_t a_t / Σ p a. The weights cross: what is grounded in the prompt weighs images.
        prompt_weights: (N,) β_t^P = p_t v_t / Σ p v.
        token_scores: (N,) β_t^V β_t^P.

    Example:
        >>> rows = torch.tensor([[0.5, 0.0, 0.1, 1.0], [0.0, 0.5, 0.3, 1.0]])
        >>> found = aggregate(rows, torch.tensor([0.8, 0.8]), image_columns=[0, 1], prompt_columns=[2])
        >>> found.image_map, found.prompt_map
        (tensor([0.1250, 0.3750]), tensor([0.2000]))
    """

    image_map: Tensor
    prompt_map: Tensor
    confidence: Tensor
    prompt_alignment: Tensor
    visual_grounding: Tensor
    image_weights: Tensor
    prompt_weights: Tensor
    token_scores: Tensor


class Aggregator:
    """:func:`aggregate` for rows that come in parts: two maps and four numbers per token are all that it keeps.

    Args:
        image_columns: (I,) columns of the image tokens, integers.
        prompt_columns: (P,) columns of the question's tokens.
        weighting: "glimpse"; or one of the paper's ablations, "confidence" (β ∝ p for both maps), "prompt" (without p:
            β^V ∝ a, β^P ∝ v) and "uniform".

    Raises:
        ArgumentError: no columns, or an unknown weighting.

    Example:
        >>> aggregator = Aggregator([0, 1], [2])
        >>> aggregator.add(torch.tensor([[0.5, 0.0, 0.1, 1.0]]), torch.tensor([0.8]))
        >>> aggregator.add(torch.tensor([[0.0, 0.5, 0.3, 1.0]]), torch.tensor([0.8]))
        >>> aggregator.result().image_map
        tensor([0.1250, 0.3750])
    """

    def __init__(
        self,
        image_columns: Tensor | Sequence[int],
        prompt_columns: Tensor | Sequence[int],
        weighting: Weighting = "glimpse",
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise ArgumentError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        self._image = _columns("image_columns", image_columns)
        self._prompt = _columns("prompt_columns", prompt_columns)
        self._weighting = weighting
        self._maps: tuple[Tensor, Tensor] | None = None
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, rows: Tensor, probabilities: Tensor, query_rows: Sequence[int] | None = None) -> None:
        """Take the rows of n more tokens, in the answer's order.

        Args:
            rows: (n, S) relevancy rows, as `relevancy_rows` gives them.
            probabilities: (n,) of the tokens.
            query_rows: (n) the tokens' query rows; their identity entries are then left out, which would count as
                relevancy of a prompt column where an answer's first token was produced at one. None: rows as they are.

        Raises:
            ArgumentError: shapes do not fit, or a column is out of range.
        """
        if rows.dim() != 2 or probabilities.shape != rows.shape[:1]:
            raise ArgumentError(
                f"rows: expected (n, S) with probabilities (n,), got {tuple(rows.shape)} and "
                f"{tuple(probabilities.shape)}"
            )
        most = max(int(self._image.max()), int(self._prompt.max()))
        if most >= rows.shape[1]:
            raise ArgumentError(f"rows: column {most} is asked for, there are {rows.shape[1]}")
        if query_rows is not None:
            rows = rows.clone()
            rows[range(len(rows)), list(query_rows)] -= 1
        of_image, of_prompt = rows[:, self._image.to(rows.device)], rows[:, self._prompt.to(rows.device)]
        confidence = probabilities.to(rows)
        alignment, grounding = of_prompt.mean(1), of_image.mean(1)
        for_image, for_prompt = {
            "glimpse": (confidence * alignment, confidence * grounding),
            "confidence": (confidence, confidence),
            "prompt": (alignment, grounding),
            "uniform": (torch.ones_like(confidence),) * 2,
        }[self._weighting]
        added = for_image @ of_image, for_prompt @ of_prompt
        self._maps = added if self._maps is None else (self._maps[0] + added[0], self._maps[1] + added[1])
        self._parts.append((confidence, alignment, grounding, for_image, for_prompt))

    def result(self) -> Aggregate:
        """Weights and maps of all tokens so far. Where no token has any weight, the maps are zero.

        Raises:
            ArgumentError: nothing was added.
        """
        if self._maps is None:
            raise ArgumentError("rows: expected at least one token, got none")
        confidence, alignment, grounding, *weights = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        totals = [weight.sum() for weight in weights]
        image_map, prompt_map = (_divided(part, total) for part, total in zip(self._maps, totals, strict=True))
        for_image, for_prompt = (_divided(weight, total) for weight, total in zip(weights, totals, strict=True))
        return Aggregate(
            image_map, prompt_map, confidence, alignment, grounding, for_image, for_prompt, for_image * for_prompt
        )


def aggregate(
    rows: Tensor,
    probabilities: Tensor,
    image_columns: Tensor | Sequence[int],
    prompt_columns: Tensor | Sequence[int],
    *,
    weighting: Weighting = "glimpse",
    query_rows: Sequence[int] | None = None,
) -> Aggregate:
    """Relevancy rows of an answer's tokens to one map of the image and one of the prompt.

    Args:
        rows: (N, S) relevancy rows, as `relevancy_rows` gives them.
        probabilities: (N,) softmax of the logits that the tokens were chosen by.
        image_columns, prompt_columns, weighting: as for :class:`Aggregator`.
        query_rows: (N) to leave each row's identity entry out; None: rows as they are.

    Returns:
        Aggregate: maps and weights, in the dtype of the rows.

    Raises:
        ArgumentError: no columns, no rows, a column out of range, or an unknown weighting.

    Example:
        >>> rows = torch.tensor([[0.5, 0.0, 0.1, 1.0], [0.0, 0.5, 0.3, 1.0]])
        >>> aggregate(rows, torch.tensor([0.8, 0.8]), [0, 1], [2]).image_weights
        tensor([0.2500, 0.7500])
    """
    aggregator = Aggregator(image_columns, prompt_columns, weighting)
    aggregator.add(rows, probabilities, query_rows)
    return aggregator.result()


def _divided(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total, 0)


def _columns(name: str, columns: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(columns, dtype=torch.long).flatten()
    if len(found) == 0 or bool((found < 0).any()):
        raise ArgumentError(f"{name}: expected at least one column, none below 0, got {found.tolist()}")
    return found
