"""The numbers that the page's script draws from: maps, scores of the question's words, and shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...methods import registry
from ..data import ExplanationData, TokenExplanation
from .colormap import ANCHORS, OPACITY_FLOOR
from .text import token_label

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["compared_method", "page_data", "question_words"]

PARTS = ("image", "question", "template", "answer")
# The longer side on which the script draws a map.
DRAWN = 560


def question_words(explanation: ExplanationData) -> list[tuple[str, list[int]]]:
    """The question's words, each with the indices of its tokens in `prompt_scores`."""
    words: list[tuple[str, list[int]]] = []
    for index, token in enumerate(explanation.prompt_tokens):
        if not token.in_question:
            continue
        if words and not token.text[:1].isspace() and not words[-1][0][-1:].isspace():
            words[-1] = (words[-1][0] + token.text, [*words[-1][1], index])
        else:
            words.append((token.text, [index]))
    return [(text.strip(), indices) for text, indices in words if text.strip()]


def _scores_without_self(explanation: ExplanationData, token: TokenExplanation) -> NDArray[np.float32]:
    """The token's prompt scores, zero at its own query row, where the rule starts with 1 and nothing is explained."""
    own = [prompt_token.position == token.position - 1 for prompt_token in explanation.prompt_tokens]
    return np.where(own, np.float32(0), token.prompt_scores)


def _compared_scores(explanation: ExplanationData) -> NDArray[np.float32]:
    """The other method's mean prompt scores, without the 1 that the rule starts with at a token's own query row."""
    assert explanation.comparison is not None
    query_rows = {token.position - 1 for token in explanation.tokens}
    own = [prompt_token.position in query_rows for prompt_token in explanation.prompt_tokens]
    return explanation.comparison.prompt_scores - np.where(own, np.float32(1 / len(explanation.tokens)), 0)


def compared_method(explanation: ExplanationData) -> str:
    assert explanation.comparison is not None
    return explanation.comparison.method.capitalize()


def page_data(explanation: ExplanationData, words: list[tuple[str, list[int]]]) -> dict[str, Any]:
    def entry(
        kind: str, label: str, probability: float, maps: list[Any], scores: Any, shares: dict[str, float] | None
    ) -> dict[str, Any]:
        return {
            "kind": kind,
            "label": label,
            "probability": probability,
            "maps": [_rounded(image_map.ravel()) for image_map in maps],
            "words": _rounded([scores[indices].sum() for _, indices in words]),
            "shares": shares and {part: float(f"{shares[part]:.6g}") for part in PARTS},
        }

    # A head maps the image alone: a share of it would look like a finding.
    of_image_alone = registry.find(explanation.method).read_out == "predicted"
    scores = [_scores_without_self(explanation, token) for token in explanation.tokens]
    of_answer = explanation.prompt_scores if explanation.weighted else np.mean(scores, axis=0)
    entries = [
        entry(
            "whole",
            "",
            explanation.confidence,
            explanation.image_maps,
            of_answer,
            None if of_image_alone else explanation.shares,
        ),
        *(
            entry("token", token_label(t.text), t.probability, t.image_maps, own, None if of_image_alone else t.shares)
            for t, own in zip(explanation.tokens, scores, strict=True)
        ),
    ]
    if explanation.comparison is not None:
        maps, compared = explanation.comparison.image_maps, _compared_scores(explanation)
        entries.insert(
            1, entry("comparison", compared_method(explanation), explanation.confidence, maps, compared, None)
        )
    images = []
    for image, image_map in zip(explanation.images, explanation.image_maps, strict=False):
        width, height = image.picture.size
        stretch = 560 / max(width, height)
        images.append(
            {
                "size": [width, height],
                "drawn": [width * stretch, height * stretch],
                "region": list(image.region),
                "grid": list(image_map.shape),
            }
        )
    return {
        "anchors": ANCHORS,
        "floor": OPACITY_FLOOR,
        "images": images,
        "entries": entries,
    }


def _rounded(values: Any) -> list[float]:
    """Six digits are plenty for colours and tooltips, and halve the page; explanation.json keeps every bit."""
    return [float(f"{value:.6g}") for value in values]
