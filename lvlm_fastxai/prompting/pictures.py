"""Pictures in every form that users have them: opened, measured, decoded, set upright."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import ArgumentError, one_line, printable

__all__ = ["FORMATS", "PIXELS_MOST", "PIXELS_VARIABLE", "load_picture", "most_pixels"]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What files may be, whatever their names say. Pillow reads more, EPS by starting Ghostscript."""

PIXELS_MOST = 64_000_000
"""Pixels that a picture may have. A processor takes about 120 bytes for each, so these need 8 GB."""

PIXELS_VARIABLE = "LVLM_FASTXAI_MAX_PIXELS"
"""Name of the environment variable that replaces `PIXELS_MOST`."""

# A processor that brings the shorter side to 336 makes 110 000 × 336 pixels of a 330 × 1 picture.
RATIO_MOST = 200

_EXPECTED = (
    "expected a path, an encoded picture's bytes or file, a PIL picture, or an array (h, w), (h, w, 1), (h, w, 3) or "
    "(h, w, 4) of uint8, uint16 or floats in 0 … 1"
)


def load_picture(source: Any, *, argument: str = "image", formats: Sequence[str] = FORMATS) -> Image.Image:
    """Load a picture as RGB, upright, with transparency over white.

    The same picture gives the same pixels in whatever form it comes. Its size is checked before it is decoded. Of an
    animated file the first frame is taken, of a PIL picture the frame it stands at. CMYK becomes RGB as Pillow does
    it, without colour profiles. Of 16 bits the upper 8 count, as in Pillow's reading of 16-bit RGB files, unless no
    value needs more than 8.

    Args:
        source: path; an encoded picture as bytes or as a binary file, read from its start; PIL picture; or array
            (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) of uint8, uint16 or floats in 0 … 1.
        argument: name that the message of an error begins with.
        formats: names of the formats of Pillow that a file may have.

    Returns:
        A new picture of the mode "RGB".

    Raises:
        ArgumentError: it cannot be read as a picture, or it is larger than `most_pixels`.

    Example:
        >>> load_picture(np.array([[0.0, 1.0]])).getpixel((1, 0))
        (255, 255, 255)
        >>> load_picture("cat.png")
        Traceback (most recent call last):
        ...
        lvlm_fastxai.errors.ArgumentError: image: there is no file 'cat.png'
    """
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, argument)
        if isinstance(source, str | os.PathLike):
            with Path(source).open("rb") as file:
                return _to_rgb(_open(file, formats), argument)
        if isinstance(source, bytes | bytearray):
            return _to_rgb(_open(io.BytesIO(source), formats), argument)
        if hasattr(source, "read") and not hasattr(source, "__array__"):
            with contextlib.suppress(OSError, AttributeError):  # of a stream
                source.seek(0)
            return _to_rgb(_open(io.BytesIO(source.read()), formats), argument)
        return _to_rgb(_from_array(source, argument), argument)
    except ArgumentError:
        raise
    except FileNotFoundError:
        raise ArgumentError(f"{argument}: there is no file '{printable(source)}'") from None
    except Exception as error:  # Pillow's decoders raise what they like on damaged files.
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ArgumentError(f"{argument}: cannot read {_name(source)} as a picture: {reason}") from error


def most_pixels() -> int:
    """Return how many pixels a picture may have: `PIXELS_MOST`, or what the environment variable says.

    Raises:
        ArgumentError: the variable holds no positive whole number.

    Example:
        >>> most_pixels()
        64000000
    """
    text = os.environ.get(PIXELS_VARIABLE, "").strip()
    if not text:
        return PIXELS_MOST
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError(f"{PIXELS_VARIABLE}: expected a number of pixels, got '{printable(text)}'")
    return int(text)


def _open(file: Any, formats: Sequence[str]) -> Image.Image:
    """Read a picture's header. Pillow's own `open` would warn of, or refuse, large ones before their size is known."""
    Image.init()
    prefix = file.read(16)
    for name in formats:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept and accept(prefix) is not True):
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError) as error:
            raise ValueError(f"damaged {name}: {one_line(error)}") from error
    raise ValueError(f"expected {', '.join(formats[:-1])} or {formats[-1]}")


def _to_rgb(picture: Image.Image, argument: str) -> Image.Image:
    _check_size(*picture.size, argument)
    picture.load()
    picture = _upright(picture)
    if picture.mode.startswith("I") or (picture.mode == "F" and np.asarray(picture).max() <= 1):  # else in 0 … 255
        picture = Image.fromarray(_to_8_bits(np.asarray(picture), argument))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _check_size(width: int, height: int, argument: str) -> None:
    shown, most = f"{width} × {height} pixels", most_pixels()
    if 0 in (width, height):
        raise ArgumentError(f"{argument}: the picture is empty, {shown}")
    if width * height > most:
        raise ArgumentError(
            f"{argument}: {shown} are more than {most / 1e6:g} million; make the picture smaller, or set "
            f"{PIXELS_VARIABLE} to what the memory allows, with about 120 bytes a pixel"
        )
    if max(width, height) > RATIO_MOST * min(width, height):
        raise ArgumentError(
            f"{argument}: {shown} are too narrow; one side may be at most {RATIO_MOST} times the other; cut a part out"
        )


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # of metadata that is damaged, which every viewer ignores
        return picture.copy()


def _from_array(source: Any, argument: str) -> Image.Image:
    try:
        values = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{argument}: {_EXPECTED}, got {type(source).__name__}") from error
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    pixels = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if not pixels or not (values.dtype.kind == "f" or values.dtype in (np.uint8, np.uint16)):
        shown = f"{type(source).__name__} of shape {values.shape}, {values.dtype}"
        raise ArgumentError(f"{argument}: {_EXPECTED}, got {shown}")
    if values.size == 0:
        raise ArgumentError(f"{argument}: the array is empty, shape {values.shape}")
    _check_size(values.shape[1], values.shape[0], argument)
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(values, argument)))


def _to_8_bits(values: NDArray[Any], argument: str) -> NDArray[np.uint8]:
    """Pixels of uint8, wider integers or floats in 0 … 1 as uint8."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            raise ArgumentError(f"{argument}: {_EXPECTED}, got values of {values.dtype} outside 0 … 1")
        return (values.astype(np.float64) * 255).round().astype(np.uint8)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ArgumentError(f"{argument}: expected values of 16 bits, got {values.min()} … {values.max()}")
    return (values >> 8 if values.max() > 0xFF else values).astype(np.uint8)


def _name(source: Any) -> str:
    return f"'{printable(source)}'" if isinstance(source, str | os.PathLike) else f"the {type(source).__name__}"
