"""What a queue holds: answers as they enter it, and as they are shown with their latest decisions."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ArgumentError
from .features import finite_features
from .policy import Decision

__all__ = ["STATES", "Record", "Shown", "State", "check_text", "exported", "picture_digest", "row_of", "shown_row"]

State = Literal["open", "confirm", "correct", "reject"]
STATES = ("open", "confirm", "correct", "reject")
"""Of an item: its latest verdict, or "open" without one or after "reopen"."""


@dataclass(frozen=True)
class Record:
    """One answer, as it enters the queue.

    Attributes:
        picture: what the question is about; kept without loss.
        question, answer: the answer is the model's.
        features: name → value, what policies decide by; None where nobody measured one.
        image_map: (h, w) relevancy, any positive scale; None without one.
        region: (left, top, right, bottom) in pixels of the picture that the map covers; None: all of it.
        model_name, model_fingerprint, head_fingerprint: whose answer and map.
        sample_id: in the source it comes from.
        extra: anything that JSON can hold.
    """

    picture: Image.Image
    question: str
    answer: str
    features: Mapping[str, float | None] = field(default_factory=dict)
    image_map: NDArray[np.float32] | None = None
    region: tuple[float, float, float, float] | None = None
    model_name: str = ""
    model_fingerprint: str = ""
    head_fingerprint: str = ""
    sample_id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """An item with its latest decision. Pictures and maps are read apart (`Queue.picture`, `Queue.image_map`).

    Attributes:
        id, created, question, answer, score, reason: of the item; times are UTC, ISO 8601.
        features: name → value of what was measured.
        picture: digest of its picture; items with the same picture share it.
        width, height: of the picture.
        region: as in `Record`.
        has_map: whether there is a map.
        model_name, model_fingerprint, head_fingerprint, sample_id, extra: as in `Record`.
        state: one of `STATES`.
        decision: number of the latest decision; None without one.
        corrected, note, reviewer, decided: of that decision; `corrected` is None unless the state is "correct".
    """

    id: int
    created: str
    question: str
    answer: str
    features: Mapping[str, float]
    score: float | None
    reason: str
    picture: str
    width: int
    height: int
    region: tuple[float, float, float, float] | None
    has_map: bool
    model_name: str
    model_fingerprint: str
    head_fingerprint: str
    sample_id: str
    extra: Mapping[str, Any]
    state: State
    decision: int | None
    corrected: str | None
    note: str | None
    reviewer: str | None
    decided: str | None


def picture_digest(picture: Image.Image) -> str:
    """Return the SHA-256 of a picture's size and RGB pixels: the same for every file format that keeps them.

    Example:
        >>> picture_digest(Image.new("L", (2, 2))) == picture_digest(Image.new("RGB", (2, 2)))
        True
    """
    pixels = picture.convert("RGB")
    return hashlib.sha256(b"%d %d " % pixels.size + pixels.tobytes()).hexdigest()


def row_of(record: Record, decision: Decision | None) -> dict[str, Any]:
    """Return a record as columns of the table of items.

    Raises:
        ArgumentError: the record cannot be kept.
    """
    texts = ("question", "answer", "model_name", "model_fingerprint", "head_fingerprint", "sample_id")
    row: dict[str, Any] = {name: check_text(name, getattr(record, name)) for name in texts}
    row["created"] = now()
    row["picture"] = picture_digest(record.picture)
    key = [row["picture"], record.question, record.sample_id, record.model_fingerprint, record.answer]
    row["digest"] = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    row["features"] = json.dumps(finite_features(record.features))
    row["score"] = None if decision is None or not np.isfinite(decision.score) else float(decision.score)
    row["reason"] = "" if decision is None else check_text("reason", decision.reason)
    if record.image_map is not None:
        image_map = np.ascontiguousarray(record.image_map, dtype="<f4")
        if image_map.ndim != 2 or image_map.size == 0 or not np.isfinite(image_map).all():
            raise ArgumentError(f"image_map: expected (h, w) finite numbers, got shape {image_map.shape}")
        row["map"], (row["map_height"], row["map_width"]) = image_map.tobytes(), image_map.shape
    if record.region is not None:
        left, top, right, bottom = record.region
        most = 4 * max(record.picture.size)
        if not (-most <= left < right <= most and -most <= top < bottom <= most):
            raise ArgumentError(f"region: expected left < right and top < bottom, in pixels, got {record.region}")
        row["region"] = json.dumps([float(edge) for edge in record.region])
    try:
        extra = json.dumps(dict(record.extra), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"extra: expected what JSON can hold: {error}") from error
    return row | {"extra": check_text("extra", extra)}


def shown_row(row: sqlite3.Row) -> Shown:
    """Return a row of the view that shows items."""
    parsed = {"region", "has_map", "features", "extra"}
    return Shown(
        **{name: row[name] for name in Shown.__dataclass_fields__ if name not in parsed},
        region=None if row["region"] is None else tuple(json.loads(row["region"])),
        has_map=row["map"] is not None,
        features=json.loads(row["features"]),
        extra=json.loads(row["extra"]),
    )


def exported(shown: Shown, image: str) -> dict[str, Any]:
    """Return a decided item as a line of an export.

    Args:
        shown: the item.
        image: path of its picture, relative to the export.
    """
    right_answer = {"confirm": shown.answer, "correct": shown.corrected}.get(shown.state)
    return {
        "id": str(shown.id),
        "image": image,
        "question": shown.question,
        **({} if right_answer is None else {"answer": right_answer}),
        "model_answer": shown.answer,
        "right": shown.state == "confirm",
        "features": shown.features,
        "score": shown.score,
        "verdict": shown.state,
        "note": shown.note,
        "reviewer": shown.reviewer,
        "created": shown.decided,
        "group": shown.picture,
        "model": shown.model_name,
        "model_fingerprint": shown.model_fingerprint,
        "head_fingerprint": shown.head_fingerprint,
        "sample": shown.sample_id,
    }


def check_text(name: str, value: Any) -> str:
    """Return text that UTF-8 can hold, or refuse it by its name."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name}: expected text, got half of a surrogate pair at {error.start}") from error
    return value


def now() -> str:
    """Return the time in UTC, ISO 8601 with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
