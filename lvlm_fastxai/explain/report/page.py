"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from importlib.resources import files
from string import Template

from PIL import Image

from ...methods import registry
from ..data import ExplanationData, TokenExplanation, UntouchedToken
from .entries import compared_method, page_data, question_words
from .facts import facts_list, how_to_read, seconds_text
from .text import percent, token_label
from .weights import weight_table

__all__ = ["render_html", "theme"]

# Embedded pictures are reduced to this many pixels on the longer side.
EMBEDDED_MOST = 1280
# Below this the browser shows the picture's pixels as squares rather than as a blur.
SMALL_PICTURE = 200


def theme() -> str:
    """CSS that every page begins with."""
    return files(__package__).joinpath("templates").joinpath("theme.css").read_text(encoding="utf-8")


def render_html(explanation: ExplanationData) -> str:
    """The whole report as one HTML document that needs no other file and no network."""
    folder = files(__package__).joinpath("templates")
    style = theme() + folder.joinpath("report.css").read_text(encoding="utf-8")
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    words = question_words(explanation)
    seconds = seconds_text(sum(explanation.seconds.values()))
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
        facts=facts_list(explanation),
        without_command="" if explanation.command else "hidden",
        command=html.escape(explanation.command),
        explanation=how_to_read(explanation),
        # "<" never appears inside the data block, so no text can end it.
        data=json.dumps(page_data(explanation, words), ensure_ascii=False, separators=(",", ":")).replace(
            "<", "\\u003c"
        ),
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _buttons(explanation: ExplanationData) -> str:
    """One radio button per entry of the data, in its order, and the tokens that were not explained in their places."""
    confidence = percent(explanation.confidence)
    if explanation.comparison is None:
        whole = _whole("Whole answer", confidence, chosen=True)
    else:
        weighted = f"weighted · {confidence}" if explanation.weighted else confidence
        whole = (
            '<div class="wholes">'
            + _whole(f"Whole answer: {registry.find(explanation.method).title}", weighted, chosen=True)
            + _whole(f"Whole answer: {compared_method(explanation)}", "mean over the same tokens", chosen=False)
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


def _whole_note(explanation: ExplanationData, weighted: str, compared: str) -> str:
    """What the whole answer's values are, for a method that weights its tokens; each part is shown while they are."""
    parts = [f'<span data-when="whole">{weighted}</span>'] if explanation.weighted else []
    if explanation.comparison is not None:
        text = html.escape(compared.format(compared_method(explanation)))
        parts.append(f'<span data-when="comparison" hidden>{text}</span>')
    return "".join(parts)


def _untouched(explanation: ExplanationData) -> str:
    if not explanation.untouched:
        return ""
    left, total = len(explanation.untouched), len(explanation.untouched) + len(explanation.tokens)
    return (
        f'<p class="hint">{left} of {total} tokens, with a dashed border, were not explained '
        f"(tokens: {html.escape(explanation.chosen_tokens)}). They hold {percent(explanation.untouched_share)} of the "
        "answer's probability mass.</p>"
    )


def _figures(explanation: ExplanationData) -> str:
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
