"""Overlay pictures and the self-contained HTML page of an explanation."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..explanation import (
    ANSWER_DEFINITION,
    CONFIDENCE_DEFINITION,
    WEIGHTED_DEFINITION,
    ExplainedImage,
    Explanation,
    TokenExplanation,
    UntouchedToken,
)
from .colormap import ANCHORS, OPACITY_FLOOR, colours, resample
from .text import percent, token_label
from .weights import weight_meanings, weight_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["overlay", "render_html", "write_overlays"]

# Overlays of small pictures are enlarged to this many pixels on the longer side, embedded pictures reduced to it.
OVERLAY_LEAST = 448
EMBEDDED_MOST = 1280
# Below this the browser shows the picture's pixels as squares rather than as a blur.
SMALL_PICTURE = 200

METHOD_NAMES = {
    "chefer": "Chefer et al. 2021, exact",
    "lvlm_interpret": "LVLM-Interpret, exact",
    "glimpse": "GLIMPSE",
    "raw_attention": "Last layer's mean attention",
    "fastrm": "FastRM, predicted by a trained head",
}
PARTS = ("image", "question", "template", "answer")


def overlay(
    image: ExplainedImage, image_map: NDArray[np.float32], *, opacity: float = 0.8, smooth: bool = True
) -> Image.Image:
    """The picture with a map (h, w) over it, coloured from 0 to the map's own maximum.

    Args:
        image: the picture and the rectangle of it that the map covers.
        image_map: (h, w) raw relevancy.
        opacity: 0 … 1 at the maximum; less where the value is smaller.
        smooth: draw the grid smoothly (`colormap.resample`), or as cells.

    Returns:
        An RGB picture, enlarged if its longer side is under 448 pixels.
    """
    picture = image.picture.convert("RGB")
    factor = max(1.0, OVERLAY_LEAST / max(picture.size))
    size = (round(picture.width * factor), round(picture.height * factor))
    base = np.asarray(picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS))
    left, top, right, bottom = (round(edge * factor) for edge in image.region)
    values = np.clip(image_map / (image_map.max() or 1.0), 0.0, 1.0).astype(np.float32)
    drawn = resample(values, max(1, bottom - top), max(1, right - left), smooth=smooth)
    # A padding processor's rectangle reaches beyond the picture, a cropping one's stays inside.
    drawn = drawn[max(0, -top) : size[1] - top, max(0, -left) : size[0] - left]
    rows = slice(max(0, top), max(0, top) + drawn.shape[0])
    columns = slice(max(0, left), max(0, left) + drawn.shape[1])
    mixed = base.astype(np.float32)
    alpha = opacity * (OPACITY_FLOOR + (1 - OPACITY_FLOOR) * drawn)[..., None]
    mixed[rows, columns] = (1 - alpha) * mixed[rows, columns] + alpha * colours(drawn)
    return Image.fromarray(mixed.round().astype(np.uint8))


def write_overlays(explanation: Explanation, folder: Path) -> dict[str, Path]:
    """Write `answer.png` and `tokens/NN_text.png` (with `_imageK` for further images); {"answer", "tokens"} paths."""
    if not explanation.images or not explanation.image_maps:
        return {}
    token_folder = folder / "tokens"
    token_folder.mkdir(exist_ok=True)
    for stale in token_folder.glob("[0-9][0-9]*_*.png"):
        stale.unlink()
    for index, (image, answer_map) in enumerate(zip(explanation.images, explanation.image_maps, strict=True)):
        suffix = f"_image{index + 1}" if index else ""
        overlay(image, answer_map).save(folder / f"answer{suffix}.png")
        for number, token in enumerate(explanation.tokens):
            slug = re.sub(r"[^\w-]+", "", token.text.strip())[:24] or f"id{token.token_id}"
            overlay(image, token.image_maps[index]).save(token_folder / f"{number:02d}_{slug}{suffix}.png")
    return {"answer": folder / "answer.png", "tokens": token_folder}


def theme() -> str:
    """CSS that every page begins with."""
    return files(__package__).joinpath("templates").joinpath("theme.css").read_text(encoding="utf-8")


def render_html(explanation: Explanation) -> str:
    """The whole report as one HTML document that needs no other file and no network."""
    folder = files(__package__).joinpath("templates")
    style = theme() + folder.joinpath("report.css").read_text(encoding="utf-8")
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    words = _question_words(explanation)
    seconds = _seconds(sum(explanation.seconds.values()))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(folder.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        policy=policy,
        title=html.escape(f"{explanation.answer} – relevancy report"),
        style=style,
        script=script,
        byline=html.escape(f"{explanation.model_name} · {explanation.method} · {seconds}"),
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in explanation.notes),
        figures=_figures(explanation),
        map_note=_whole_note(explanation, "Weighted by β<sup>V</sup>. ", "{}’s mean. "),
        word_note=_whole_note(explanation, ", weighted by β<sup>P</sup>", ", {}’s mean") if words else "",
        without_maps="" if explanation.image_maps else "hidden",
        words="".join(f"<li><span>{html.escape(text)}</span><small></small></li>" for text, _ in words),
        tokens=_buttons(explanation),
        untouched=_untouched(explanation),
        weights=weight_table(explanation.tokens) if explanation.weighted else "",
        facts=_facts(explanation),
        without_command="" if explanation.command else "hidden",
        command=html.escape(explanation.command),
        explanation=_how_to_read(explanation),
        # "<" never appears inside the data block, so no text can end it.
        data=json.dumps(_data(explanation, words), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _question_words(explanation: Explanation) -> list[tuple[str, list[int]]]:
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


def _scores_without_self(explanation: Explanation, token: TokenExplanation) -> NDArray[np.float32]:
    """The token's prompt scores, zero at its own query row, where the rule starts with 1 and nothing is explained."""
    own = [prompt_token.position == token.position - 1 for prompt_token in explanation.prompt_tokens]
    return np.where(own, np.float32(0), token.prompt_scores)


def _compared_scores(explanation: Explanation) -> NDArray[np.float32]:
    """The other method's mean prompt scores, without the 1 that the rule starts with at a token's own query row."""
    assert explanation.comparison is not None
    query_rows = {token.position - 1 for token in explanation.tokens}
    own = [prompt_token.position in query_rows for prompt_token in explanation.prompt_tokens]
    return explanation.comparison.prompt_scores - np.where(own, np.float32(1 / len(explanation.tokens)), 0)


def _buttons(explanation: Explanation) -> str:
    """One radio button per entry of the data, in its order, and the tokens that were not explained in their places."""
    confidence = percent(explanation.confidence)
    if explanation.comparison is None:
        whole = _whole("Whole answer", confidence, chosen=True)
    else:
        weighted = f"weighted · {confidence}" if explanation.weighted else confidence
        whole = (
            '<div class="wholes">'
            + _whole(f"Whole answer: {METHOD_NAMES[explanation.method]}", weighted, chosen=True)
            + _whole(f"Whole answer: {_compared(explanation)}", "mean over the same tokens", chosen=False)
            + "</div>"
        )
    pieces: list[TokenExplanation | UntouchedToken] = [*explanation.tokens, *explanation.untouched]
    pieces.sort(key=lambda piece: piece.position)
    parts = [whole]
    for number, piece in enumerate(pieces):
        joined = " joined" if number and not piece.text[:1].isspace() else ""
        share = percent(piece.probability)
        inside = (
            f'<span class="text">{html.escape(token_label(piece.text))}</span>'
            f'<small aria-label="probability {share}">{share}</small>'
        )
        if isinstance(piece, TokenExplanation):
            parts.append(
                f'<button type="button" class="token{joined}" role="radio" aria-checked="false" tabindex="-1">'
                f"{inside}</button>"
            )
        else:
            parts.append(f'<span class="untouched{joined}"><span class="hidden">not explained: </span>{inside}</span>')
    return "".join(parts)


def _whole(text: str, below: str, *, chosen: bool) -> str:
    state = 'aria-checked="true"' if chosen else 'aria-checked="false" tabindex="-1"'
    return (
        f'<button type="button" class="token whole" role="radio" {state}>'
        f'<span class="text">{html.escape(text)}</span><small>{below}</small></button>'
    )


def _compared(explanation: Explanation) -> str:
    assert explanation.comparison is not None
    return explanation.comparison.method.capitalize()


def _whole_note(explanation: Explanation, weighted: str, compared: str) -> str:
    """What the whole answer's values are, for a method that weights its tokens; each part is shown while they are."""
    parts = [f'<span data-when="whole">{weighted}</span>'] if explanation.weighted else []
    if explanation.comparison is not None:
        text = html.escape(compared.format(_compared(explanation)))
        parts.append(f'<span data-when="comparison" hidden>{text}</span>')
    return "".join(parts)


def _untouched(explanation: Explanation) -> str:
    if not explanation.untouched:
        return ""
    left, total = len(explanation.untouched), len(explanation.untouched) + len(explanation.tokens)
    return (
        f'<p class="hint">{left} of {total} tokens, with a dashed border, were not explained '
        f"(tokens: {html.escape(explanation.chosen_tokens)}). They hold {percent(explanation.untouched_share)} of the "
        "answer's probability mass.</p>"
    )


def _figures(explanation: Explanation) -> str:
    figures = []
    canvas = '<canvas role="img" aria-label="Relevancy map over the image"></canvas>' if explanation.image_maps else ""
    for index, image in enumerate(explanation.images):
        name = f"Image {index + 1} of {len(explanation.images)}" if len(explanation.images) > 1 else "The image"
        small = ' class="small"' if max(image.picture.size) < SMALL_PICTURE else ""
        label = f"{name} that the question is about"
        figures.append(
            f'<figure><div class="frame"><img{small} src="{_embedded(image.picture)}" alt="{label}" '
            f'width="{image.picture.width}" height="{image.picture.height}">'
            f"{canvas}</div></figure>"
        )
    return "".join(figures)


def _embedded(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    # A photograph as PNG can be ten times its JPEG; a small or drawn picture stays exact.
    photograph = picture.width * picture.height > 256 * 256 and picture.getcolors(4096) is None
    if max(picture.size) > EMBEDDED_MOST:
        picture.thumbnail((EMBEDDED_MOST, EMBEDDED_MOST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if photograph:
        picture.save(stream, "JPEG", quality=90)
    else:
        picture.save(stream, "PNG", optimize=True)
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()


def _data(explanation: Explanation, words: list[tuple[str, list[int]]]) -> dict[str, Any]:
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
    of_image_alone = explanation.method == "fastrm"
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
        entries.insert(1, entry("comparison", _compared(explanation), explanation.confidence, maps, compared, None))
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


def _decision(explanation: Explanation) -> dict[str, str]:
    facts = {} if explanation.entropy is None else {"Map entropy": f"{explanation.entropy:.3f} (FastRM, 0 to 1)"}
    if explanation.decision is not None:
        facts["Decision"] = f"{explanation.decision['verdict']}: {explanation.decision['reason']}"
    return facts


def _facts(explanation: Explanation) -> str:
    facts = {
        "Method": METHOD_NAMES.get(explanation.method, explanation.method),
        **{name.replace("_", " ").capitalize(): str(value) for name, value in explanation.options.items()},
        **_choice(explanation),
        "Model": explanation.model_name,
        "Architecture": explanation.model_class,
        "Confidence": percent(explanation.confidence),
        **_decision(explanation),
        "Time to answer": _seconds(explanation.seconds.get("generate", 0.0)),
        "Time to explain": _seconds(explanation.seconds.get("explain", 0.0)),
        "Peak memory": "not measured" if explanation.peak_bytes is None else _bytes(explanation.peak_bytes),
        "Memory mode": explanation.memory,
        "Backend": explanation.backend,
        "Device": f"{explanation.device}, {explanation.dtype}",
        "Sequence": f"{explanation.sequence_length} positions",
        "Image grid": ", ".join(f"{m.shape[0]} × {m.shape[1]}" for m in explanation.image_maps) or "unknown",
        **_pruning(explanation),
        "Versions": ", ".join(f"{name} {version}" for name, version in explanation.versions.items()),
    }
    return "".join(
        # A long class name may break between its words.
        f"<div><dt>{html.escape(name)}</dt><dd>{re.sub('(?<=[a-z])(?=[A-Z])', '<wbr>', html.escape(value))}</dd></div>"
        for name, value in facts.items()
    )


def _choice(explanation: Explanation) -> dict[str, str]:
    if explanation.chosen_tokens == "all":
        return {}
    explained = len(explanation.tokens)
    return {"Tokens": f"{explanation.chosen_tokens}: {explained} of {explained + len(explanation.untouched)}"}


def _pruning(explanation: Explanation) -> dict[str, str]:
    if explanation.row_tolerance == 0:
        return {}
    if explanation.share_of_rows == 1:
        return {"Row tolerance": f"{explanation.row_tolerance}: exact"}
    return {
        "Row tolerance": f"{explanation.row_tolerance}: {percent(explanation.share_of_rows)} of the rows visited",
        "Estimated error": f"at most {percent(explanation.estimated_error)} of a token's relevancy",
    }


def _how_to_read(explanation: Explanation) -> str:
    exact = (
        "The map of a token is the relevancy of each image patch for the raw logit of that token, propagated through "
        "every layer of the language model."
        if explanation.method in ("chefer", "lvlm_interpret")
        else "The map of a token holds one score for each image patch, as the method named above defines it."
    )
    lines = [
        f"{exact} Values are raw: not rescaled, not thresholded. The colour scale runs from zero to the largest value "
        "of the token shown; “one scale for all tokens” keeps it fixed instead. “Raw grid” shows the patches as the "
        "model has them; otherwise they are drawn smoothly through the same values. The overlay is more transparent "
        "where the value is small.",
        f"For the whole answer, maps and scores are the "
        f"{WEIGHTED_DEFINITION if explanation.weighted else ANSWER_DEFINITION}. "
        f"Its confidence is the {CONFIDENCE_DEFINITION}.",
        "“Where the relevancy lies” sums the raw values over the image, the question, the prompt's template (the words "
        "and markers around the question) and the answer's earlier tokens. The entry of the position that produced the "
        "token is left out, there and in the question's words."
        + (" For the whole answer it is the tokens' plain mean, without weights." if explanation.weighted else ""),
        "A map says which inputs the answer depends on by this measure. It does not say that the answer is right.",
    ]
    if explanation.method == "fastrm":
        lines.insert(
            -1,
            "A trained head has predicted these maps, values between 0 and 1, while the answer was written. They "
            "are approximate, and of the image alone: the zeros at the question's words are no measurement, and there "
            "are no sums by part. The entropy says how concentrated a map is: 0 on one patch, 1 on all alike.",
        )
    if explanation.comparison is not None:
        lines.insert(
            -1,
            f"The comparison is the {ANSWER_DEFINITION} by {_compared(explanation)}, for the same tokens and from the "
            "same backward passes. It has a colour scale of its own, and its values and those of the other method have "
            "no common unit: compare where they lie, not how large they are. There are no sums by part for it.",
        )
    parts = [f"<p>{html.escape(line)}</p>" for line in lines]
    if explanation.weighted:
        parts.insert(
            -1,
            "<p>In the table of token weights the bars of p run to 100 %, all others to the largest value of their "
            f"column.</p>{weight_meanings()}",
        )
    return "".join(parts)


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
