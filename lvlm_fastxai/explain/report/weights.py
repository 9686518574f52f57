"""The table of what each token counts for in the whole answer."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..data import TokenExplanation, TokenWeight
from .text import token_label, unit_of, unit_text

__all__ = ["weight_meanings", "weight_table"]


@dataclass(frozen=True)
class _Column:
    """One quantity: its symbol as text and as HTML, its name with the places where it may break, what it is, and what
    it is about, which gives its colour. A `share` is written in per cent; `full` is where its bar ends, None for the
    largest value."""

    symbol: str
    drawn: str
    name: str
    meaning: str
    about: str
    value: Callable[[TokenExplanation, TokenWeight], float]
    share: bool = False
    full: float | None = None


_COLUMNS = (
    _Column(
        "p",
        "p",
        "proba\u00adbility",
        "softmax of the raw logits, at the token",
        "token",
        lambda token, weight: token.probability,
        share=True,
        full=1.0,
    ),
    _Column(
        "a",
        "a",
        "prompt align\u00adment",
        "mean relevancy of the question's tokens",
        "question",
        lambda token, weight: weight.prompt_alignment,
    ),
    _Column(
        "v",
        "v",
        "visual ground\u00ading",
        "mean relevancy of the image's tokens",
        "image",
        lambda token, weight: weight.visual_grounding,
    ),
    _Column(
        "βV",
        "β<sup>V</sup>",
        "image weight",
        "p·a over its sum over the tokens; weighs the token's map in the answer's map of the image",
        "image",
        lambda token, weight: weight.image_weight,
        share=True,
    ),
    _Column(
        "βP",
        "β<sup>P</sup>",
        "prompt weight",
        "p·v over its sum over the tokens; weighs the token's scores in the answer's scores of the question",
        "question",
        lambda token, weight: weight.prompt_weight,
        share=True,
    ),
    _Column(
        "γ",
        "γ",
        "token score",
        "product of both weights",
        "token",
        lambda token, weight: weight.score,
    ),
)


def weight_table(tokens: Sequence[TokenExplanation]) -> str:
    """The section with one row per token, all of which have a weight."""
    weights = [token.weight for token in tokens if token.weight is not None]
    heads, cells = [], []
    for column in _COLUMNS:
        values = [column.value(token, weight) for token, weight in zip(tokens, weights, strict=True)]
        unit = -2 if column.share else unit_of(values)
        full = column.full or max(values)
        heads.append(_head(column, "%" if column.share else unit_text(unit)))
        cells.append([_cell(column, value, unit, full) for value in values])
    rows = "".join(
        f'<tr><th scope="row"><button type="button" tabindex="-1">{html.escape(token_label(token.text))}</button></th>'
        f"{''.join(of_token)}</tr>"
        for token, of_token in zip(tokens, zip(*cells, strict=True), strict=True)
    )
    return (
        '<section aria-labelledby="weights-title"><h2 id="weights-title">Token weights</h2>'
        '<p class="lead">The whole answer’s map is the sum of the tokens’ maps, weighted by β<sup>V</sup>; its scores '
        f"of the question are the sum of theirs, weighted by β<sup>P</sup>.{_without_weight(weights)}</p>"
        '<div class="weights" id="weights"><table><caption class="hidden">What each token counts for. The button of a '
        'row chooses its token.</caption><thead><tr><th scope="col">Token</th>'
        f"{''.join(heads)}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def weight_meanings() -> str:
    """The table's symbols in words."""
    return (
        '<dl class="meanings">'
        + "".join(f"<div><dt>{c.drawn}</dt><dd>{_plain(c.name)}: {html.escape(c.meaning)}</dd></div>" for c in _COLUMNS)
        + "</dl>"
    )


def _without_weight(weights: Sequence[TokenWeight]) -> str:
    zero = [
        text
        for text, values in (
            ("prompt alignment, so the answer’s map is zero", [w.image_weight for w in weights]),
            ("visual grounding, so the answer’s scores are zero", [w.prompt_weight for w in weights]),
        )
        if not any(values)
    ]
    return f" No token has any {' nor any '.join(zero)}." if zero else ""


def _head(column: _Column, unit: str) -> str:
    words = html.escape(f"{_plain(column.name)}: {column.meaning}")
    # `abbr` is what is read out with every cell, the rest once.
    return (
        f'<th scope="col" class="about-{column.about}" abbr="{_plain(column.name)}" title="{words}">'
        f"<b>{column.drawn}</b><small>{unit}</small><span>{column.name}</span>"
        f'<span class="hidden">: {html.escape(column.meaning)}</span></th>'
    )


def _cell(column: _Column, value: float, unit: int, full: float) -> str:
    width = 100 * min(1.0, max(0.0, value / full)) if full > 0 else 0.0
    digits = 1 if column.share else 2
    return (
        f'<td class="about-{column.about}"><data value="{value:.6g}">{value / 10**unit:.{digits}f}</data>'
        f'<svg viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true"><rect width="{width:.2f}" height="4"/>'
        "</svg></td>"
    )


def _plain(name: str) -> str:
    return name.replace("\u00ad", "")
