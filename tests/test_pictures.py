"""Pictures in every form that users have them, and those that must not be read."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.prompting.pictures import FORMATS, PIXELS_MOST, PIXELS_VARIABLE, load_picture

SIZE = (24, 16)


def noise(channels: int = 3) -> Image.Image:
    """24 pixels wide, 16 high."""
    rng = np.random.default_rng(3)
    shape = (SIZE[1], SIZE[0]) if channels == 1 else (SIZE[1], SIZE[0], channels)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def encoded(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG of one colour: a few kilobytes, however large."""
    rows = zlib.compress(bytes(height * (width // 8 + 1)), 9)
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT" + rows, b"IEND"]
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def same(first: Image.Image, second: Image.Image) -> None:
    assert first.mode == second.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_form_gives_the_same_upright_picture(orientation: int, kind: str, tmp_path: Path) -> None:
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(noise(), kind, exif=turned(orientation), **settings)
    path = tmp_path / "picture"
    path.write_bytes(data)
    held = noise()
    held.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(held)
    assert upright.size == (SIZE if orientation < 5 else SIZE[::-1])
    pixels = np.asarray(upright)
    file = io.BytesIO(data)
    file.seek(9)  # as a caller who has looked at it leaves it
    with path.open("rb") as opened, Image.open(path) as lazy:
        forms = [path, str(path), data, bytearray(data), file, file, opened, lazy, held, upright, pixels]
        forms += [pixels / 255, (pixels / 255).astype(np.float32), torch.tensor(pixels)]
        for form in forms:
            same(load_picture(form), upright)
    assert held.getexif()[0x0112] == orientation, "the caller's own picture stays as it was"


def test_sixteen_bits(tmp_path: Path) -> None:
    """Pillow's own conversion makes all above 255 white."""
    values = np.random.default_rng(4).integers(0, 1 << 16, (16, 24), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    for form in (tmp_path / "a.png", values, Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        same(load_picture(form), expected)
    same(load_picture(np.stack([values] * 3, 2)), expected)
    dark = Image.fromarray(values >> 8)
    same(load_picture(dark), expected)  # 8 bits in wider numbers
    unit = Image.fromarray((values / 65535).astype(np.float32))
    same(load_picture(unit), load_picture(np.asarray(unit)))


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 51))
    palette = Image.new("P", (4, 4))
    data = encoded(palette, transparency=0)
    for form, colour in ((clear, 255), (half, 204), (np.asarray(clear), 255), (data, 255)):
        assert load_picture(form).getpixel((2, 2)) == (colour,) * 3


def test_cmyk_is_converted_as_pillow_does(tmp_path: Path) -> None:
    noise().convert("CMYK").save(tmp_path / "print.tif")
    same(load_picture(tmp_path / "print.tif"), noise().convert("CMYK").convert("RGB"))
    assert load_picture(Image.new("CMYK", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (0, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animated_file_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert load_picture(data).getpixel((0, 0)) == (255, 0, 0)
    with Image.open(io.BytesIO(data)) as opened:
        opened.seek(1)
        assert load_picture(opened).getpixel((0, 0)) == (0, 0, 255)


def test_one_limit_for_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIXELS_VARIABLE, "383")
    data = encoded(noise())
    for form in (data, io.BytesIO(data), noise(), np.asarray(noise()), Image.open(io.BytesIO(data))):
        with pytest.raises(ArgumentError, match=r"24 × 16 pixels are more than 0.000383 million.*LVLM_FASTXAI_MAX_"):
            load_picture(form)
    monkeypatch.setenv(PIXELS_VARIABLE, "384")
    same(load_picture(data), noise())
    monkeypatch.setenv(PIXELS_VARIABLE, "much")
    with pytest.raises(ArgumentError, match="LVLM_FASTXAI_MAX_PIXELS: expected a number of pixels, got 'much'"):
        load_picture(data)


@pytest.mark.parametrize("side", [8001, 11_000, 20_000])
@pytest.mark.filterwarnings("error")
def test_a_large_picture_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Pillow would warn (89 megapixels) or refuse in its own words (179)."""
    monkeypatch.delenv(PIXELS_VARIABLE, raising=False)
    data = png(side, side)
    assert len(data) < 200_000 and side**2 > PIXELS_MOST

    def decoded(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(ArgumentError, match=rf"{side} × {side} pixels are more than 64 million; make the picture"):
        load_picture(data)


def test_a_raised_limit_holds_beyond_pillow_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    same(load_picture(encoded(noise())), noise())


def test_a_picture_that_a_processor_would_blow_up_is_refused() -> None:
    with pytest.raises(ArgumentError, match="1 × 5000 pixels are too narrow"):
        load_picture(np.zeros((5000, 1), np.uint8))
    assert load_picture(np.zeros((200, 1), np.uint8)).size == (1, 200)


def test_what_a_file_is_decides_not_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file's name."""
    started: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: started.append(command))
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
    path = tmp_path / "innocent.png"
    path.write_bytes(encoded(noise(), "EPS"))
    with pytest.raises(ArgumentError, match=rf"innocent.png' .*: expected {', '.join(FORMATS[:-1])} or WEBP$"):
        load_picture(path)
    assert not started
    (tmp_path / "photo.eps").write_bytes(encoded(noise()))
    same(load_picture(tmp_path / "photo.eps"), noise())
    with pytest.raises(ArgumentError, match=r"^upload: .*expected JPEG or WEBP$"):
        load_picture(encoded(noise()), argument="upload", formats=("JPEG", "WEBP"))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
def test_damaged_files_are_one_line(kind: str, tmp_path: Path) -> None:
    """Cut short and with bytes changed at random: read after all, or refused in one line."""
    rng = np.random.default_rng(5)
    whole = encoded(noise(), kind)
    refused = 0
    for number in range(40):
        data = bytearray(whole[: rng.integers(1, len(whole))] if number % 2 else whole)
        for place in rng.integers(0, len(data), number // 2):
            data[place] = rng.integers(256)
        try:
            assert load_picture(bytes(data)).mode == "RGB"
        except ArgumentError as error:
            refused += 1
            assert str(error).isprintable(), error
    assert refused > 5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_orientation_is_none() -> None:
    picture = noise()
    picture.info["exif"] = b"Exif\0\0MM\0*\0\0\xff\xff damaged"
    same(load_picture(picture), noise())
    same(load_picture(encoded(noise(), exif=b"Exif\0\0II damaged")), noise())


@pytest.mark.parametrize(
    ("name", "shown"), [("caf\udce9.png", r"caf\xe9.png"), ("a\x1b[2J.png", r"a\x1b[2J.png"), ("a\nb", r"a\x0ab")]
)
def test_names_that_cannot_be_printed_are_spelled_out(name: str, shown: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(ArgumentError) as missing:
        load_picture(path)
    path.write_bytes(b"no picture")
    with pytest.raises(ArgumentError) as damaged:
        load_picture(path)
    for caught in (missing, damaged):
        assert shown in str(caught.value) and str(caught.value).isprintable()
    path.write_bytes(encoded(noise()))
    same(load_picture(path), noise())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (".", "cannot read '.' as a picture: Is a directory"),
        ("a\0b", "cannot read"),
        (b"", "cannot read the bytes as a picture: expected AVIF"),
        (io.StringIO("text"), "cannot read the StringIO"),
        (None, "expected a path"),
        (np.zeros((4, 4), np.int64), "got ndarray of shape .*int64"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.full((4, 4), 1.5), "outside 0 … 1"),
        (np.full((4, 4), np.nan), "outside 0 … 1"),
        (np.zeros((0, 4), np.uint8), "empty"),
        (Image.new("RGB", (0, 4)), "empty"),
        (Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "16 bits"),
    ],
)
def test_what_is_no_picture_is_refused(source: object, expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected) as caught:
        load_picture(source)
    assert str(caught.value).isprintable() and str(caught.value).startswith("image: ")
