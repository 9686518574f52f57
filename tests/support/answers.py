"""Answers for a review queue, with pictures and with texts that attack a page."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from lvlm_fastxai.review import Record

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{token}}"


def picture(number: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A dark square on a bright ground, elsewhere for each number."""
    pixels = np.full((size[1], size[0], 3), 230, np.uint8)
    top, left = 4 + 5 * (number % 4), 6 + 9 * (number % 5)
    pixels[top : top + 14, left : left + 14] = (40, 60 + 30 * (number % 5), 160)
    return Image.fromarray(pixels)


def record(number: int, **changes: Any) -> Record:
    image_map = np.full((4, 6), 0.05, np.float32)
    image_map[1, number % 6] = 1.0
    values: dict[str, Any] = {
        "question": f"what is in picture {number}?",
        "answer": f"a square {number}",
        "features": {"entropy": 0.5, "probability": 0.25},
        "image_map": image_map,
        "model_name": "a model",
        "sample_id": f"sample-{number}",
    }
    return Record(picture(number), **values | changes)


def png(size: tuple[int, int] = (60, 40), kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture(0, size).save(stream, kind, **options)
    return stream.getvalue()
