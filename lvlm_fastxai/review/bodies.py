"""Reads what clients of the review page send: JSON and forms by name and type, pictures by decoding them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

from flask import Request
from PIL import Image

from ..errors import ArgumentError, one_line
from ..prompting.pictures import load_picture
from .features import FEATURES
from .items import Record
from .schema import VERDICTS

__all__ = ["BODY_MOST", "UPLOAD_MOST", "read_decision", "read_text", "read_upload"]

BODY_MOST = 64 * 1024
UPLOAD_MOST = 20 * 1024 * 1024
TEXT_MOST = {"question": 4000, "answer": 20_000, "note": 4000, "reviewer": 200, "reason": 4000, "sample_id": 400}
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")


def read_decision(request: Request) -> dict[str, Any]:
    """Return the keyword arguments of `Queue.decide` that a request's body holds.

    Raises:
        ArgumentError: it holds something else.
    """
    body = _json_body(request)
    if unknown := body.keys() - {"verdict", "answer", "note", "reviewer", "seen"}:
        raise ArgumentError(f"body: unknown {', '.join(sorted(unknown))}")
    seen = body.get("seen")
    if "seen" not in body or not (seen is None or (type(seen) is int and seen > 0)):
        raise ArgumentError("seen: expected the number of the decision that was shown, or null")
    if body.get("verdict") not in VERDICTS:
        raise ArgumentError(f"verdict: expected one of {', '.join(VERDICTS)}")
    return {
        "verdict": body["verdict"],
        "answer": None if body.get("answer") is None else read_text(body, "answer"),
        "note": read_text(body, "note", needed=False),
        "reviewer": read_text(body, "reviewer", needed=False),
        "seen": seen,
    }


def read_upload(request: Request, added: str) -> tuple[Record, str]:
    """Return the record that a form holds, and why it should be looked at.

    Args:
        request: with a form of multipart/form-data.
        added: by whom, kept with the record.

    Raises:
        ArgumentError: it holds something else.
    """
    form, uploaded = request.form, request.files
    texts = ("question", "answer", "reason", "sample_id")
    if unknown := (form.keys() - {*FEATURES, *texts}) | (uploaded.keys() - {"picture"}):
        raise ArgumentError(f"form: unknown {', '.join(sorted(unknown))}")
    if len(uploaded.getlist("picture")) != 1:
        raise ArgumentError("picture: expected one file, as multipart/form-data")
    text = {name: read_text(form, name, needed=name in ("question", "answer")) for name in texts}
    record = Record(
        _uploaded_picture(uploaded["picture"].read()),
        text["question"],
        text["answer"],
        {name: _share(form, name) for name in FEATURES},
        sample_id=text["sample_id"],
        extra={"added": added},
    )
    return record, text["reason"]


def read_text(given: Mapping[str, Any], name: str, most: int | None = None, *, needed: bool = True) -> str:
    """Return a text of limited length without the white space around it.

    Raises:
        ArgumentError: it is something else, or empty where it is needed.
    """
    value, most = given.get(name, ""), most or TEXT_MOST[name]
    if not isinstance(value, str) or len(value) > most:
        raise ArgumentError(f"{name}: expected text of at most {most} characters")
    if "\0" in value:
        raise ArgumentError(f"{name}: expected text, got a NUL character")
    if needed and not value.strip():
        raise ArgumentError(f"{name}: expected some text, got none")
    return value.strip()


def _json_body(request: Request) -> dict[str, Any]:
    if request.mimetype != "application/json":
        raise ArgumentError("body: expected application/json")
    try:
        body = json.loads(request.get_data())
    # A body of many brackets goes deeper than Python's stack.
    except (ValueError, RecursionError):
        raise ArgumentError("body: expected JSON") from None
    if not isinstance(body, dict):
        raise ArgumentError("body: expected an object")
    return body


def _share(form: Mapping[str, str], name: str) -> float | None:
    text = form.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ArgumentError(f"{name}: expected a number in 0 … 1, got {text[:40]!r}")
    return value


def _uploaded_picture(content: bytes) -> Image.Image:
    """Return the pixels of an uploaded file and nothing else of it."""
    picture = load_picture(content, argument="picture", formats=UPLOAD_FORMATS)
    try:
        with Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS) as file:
            file.verify()  # a file that is cut may still hold all of its pixels
    except Exception as error:  # Decoders raise what they like on damaged files.
        raise ArgumentError(f"picture: the file is damaged: {one_line(error)}") from error
    return picture
