"""Pictures with questions from three kinds of sources, one interface: JSONL, a `datasets` folder, generated scenes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ArgumentError, one_line, printable
from ..tiny import scenes
from .pictures import load_picture

SPLITS = {"train": scenes.TRAIN_SEEDS, "validation": scenes.VALIDATION_SEEDS, "held-out": scenes.HELD_OUT_SEEDS}
SCENES_PER_SEED = 1_000_000
# Scenes that a group of questions, one of each kind, has for itself. The rarest kind (comparison) fits more than every
# other scene, so that hardly ever a group looks for it in the scenes of the next.
SCENES_PER_GROUP = 16


@dataclass(frozen=True)
class Sample:
    """A question about a picture.

    Attributes:
        id: unique in its source and the same whenever the source is opened.
        question: plain text.
        answer: the reference answer, where the source has one.
        kind: of the question, where the source says.
        mask: (H, W) bool, the pixels that decide the answer; None where they are not known.
        load: reads the picture.
    """

    id: str
    question: str
    answer: str | None
    kind: str | None
    mask: NDArray[np.bool_] | None = field(repr=False, compare=False)
    load: Callable[[], Image.Image] = field(repr=False, compare=False)

    def picture(self) -> Image.Image:
        """Read the picture, RGB, anew at every call.

        Raises:
            ArgumentError: it is not there or cannot be read; the message names the sample.
        """
        return self.load()


class Source(Sequence[Sample], ABC):
    """Samples in a fixed order.

    Attributes:
        spec: what was opened, without the folders that lead to it.
        digest: SHA-256 of what it holds, the pictures' files included, hexadecimal.
    """

    spec: str
    digest: str

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._sample(number) for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._sample(number)

    @abstractmethod
    def _sample(self, index: int) -> Sample: ...


def open_source(spec: str) -> Source:
    """Open a source of pictures and questions.

    Args:
        spec: one of

            - the path of a JSONL file with a line ``{"image": …, "question": …, "answer": …, "id": …, "kind": …}`` for
              each sample, of which the first two are needed; the image's path is relative to the file. Decisions that
              `lvlm-fastxai review` exports are such lines;
            - a folder written by ``datasets.Dataset.save_to_disk``, with the columns image and question, and perhaps
              answer, id and kind;
            - ``scenes:SPLIT?count=N`` with SPLIT train, validation or held-out: N questions about generated scenes,
              kinds taken in turn, those of a group about the same scene as far as it allows them. Options, joined by
              ``&``: ``seed=K`` takes other scenes, ``kinds=a,b`` or ``without=a,b`` only some kinds.

    Raises:
        ArgumentError: nothing of the sort; for a malformed line the message names it.

    Example:
        >>> source = open_source("scenes:held-out?count=20&kinds=color,shape")
        >>> len(source), source[0].kind, source[0].picture().size
        (20, 'color', (192, 192))
    """
    if spec.startswith("scenes:"):
        return SceneSource.parse(spec)
    path = Path(spec)
    if path.is_dir():
        return DatasetSource(path)
    if path.is_file():
        return JsonlSource(path)
    raise ArgumentError(
        f"source: there is no '{printable(spec)}'; give a .jsonl file, a folder written by datasets' save_to_disk, or "
        "scenes:train?count=1000"
    )


class JsonlSource(Source):
    """A file with one JSON object per line; pictures are looked at only when a sample is asked for its own."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"source: cannot read '{printable(path)}': {one_line(error)}") from error
        self.spec = printable(path.name)
        self._path = path
        self._lines: list[tuple[int, dict[str, str]]] = []
        numbers: dict[str, int] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            values = self._parse(number, line)
            name = values["id"]
            if name in numbers:
                raise self._bad(number, f"has the id {name!r} of line {numbers[name]}; every id may stand once")
            numbers[name] = number
            self._lines.append((number, values))
        if not self._lines:
            raise ArgumentError(f"source: '{printable(path)}' holds no sample")
        # Line ends and blank lines aside, which version control changes.
        lines = (line.rstrip("\r") for line in text.split("\n") if line.strip())
        self._lines_digest = hashlib.sha256("\n".join(lines).encode())

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        """SHA-256 of the lines and of the pictures' files, which are read when it is first asked for."""
        digest = self._lines_digest.copy()
        for _, values in self._lines:
            digest.update(_file_digest(self._path.parent / values["image"]))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    def _sample(self, index: int) -> Sample:
        number, values = self._lines[index]

        def load() -> Image.Image:
            try:
                return load_picture(self._path.parent / values["image"])
            except ArgumentError as error:
                raise self._bad(number, str(error)) from error

        return Sample(values["id"], values["question"], values.get("answer"), values.get("kind"), None, load)

    def _parse(self, number: int, line: str) -> dict[str, str]:
        """The keys that matter; others are left to whoever wrote them."""
        try:
            values = json.loads(line)
        except RecursionError:
            raise self._bad(number, "is not JSON that can be read: it is nested too deeply") from None
        except ValueError as error:
            raise self._bad(number, f"is not JSON: {one_line(error)}") from error
        if not isinstance(values, dict):
            raise self._bad(number, f"is not an object with the keys image and question, but {type(values).__name__}")
        found = {"id": f"line-{number}"}
        for key in ("image", "question", "answer", "id", "kind"):
            value = values.get(key)
            needed = key in ("image", "question")
            if key == "id" and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if value is None and not needed:
                continue
            if not isinstance(value, str) or (needed and not value.strip()):
                expected = "some text" if needed else "text, or nothing,"
                raise self._bad(number, f"has {json.dumps(value)} as its {key!r} where {expected} is expected")
            try:
                # A file's name may hold bytes that are no UTF-8, which Python writes as surrogates.
                value.encode("utf-8", "surrogateescape" if key == "image" else "strict")
            except UnicodeEncodeError as error:
                raise self._bad(number, f"has half a character, a lone surrogate, in its {key!r}") from error
            found[key] = value
        return found

    def _bad(self, number: int, what: str) -> ArgumentError:
        return ArgumentError(f"source: '{printable(self._path)}', line {number}: {printable(what)}")


class DatasetSource(Source):
    """A split that `datasets` has saved; its own fingerprint tells it from others."""

    def __init__(self, folder: Path) -> None:
        try:
            import datasets
        except ImportError:
            raise ArgumentError(
                f"source: '{folder}' is a folder, which `datasets` reads: pip install datasets"
            ) from None
        # Bars would stand among our own.
        datasets.disable_progress_bars()
        try:
            data: Any = datasets.load_from_disk(str(folder))
        except Exception as error:  # Arrow and datasets raise what they like on damaged or other folders.
            raise ArgumentError(
                f"source: cannot read '{folder}' as a folder of datasets' save_to_disk: {one_line(error)}"
            ) from error
        if isinstance(data, datasets.DatasetDict):
            raise ArgumentError(f"source: '{folder}' holds the splits {', '.join(data)}; give one, '{folder}/SPLIT'")
        missing = [name for name in ("image", "question") if name not in data.column_names]
        if missing or not len(data):
            what = f"has no column {' and '.join(missing)}" if missing else "holds no sample"
            raise ArgumentError(f"source: '{folder}' {what}; its columns are {', '.join(data.column_names)}")
        self.spec = printable(folder.resolve().name)
        self._folder = folder
        self._data = data
        self._pictures = data.select_columns("image")
        # Reading a row decodes its picture, which whoever wants the question alone need not wait for.
        self._texts = data.select_columns(
            [name for name in ("question", "answer", "id", "kind") if name in data.column_names]
        )
        if "id" in data.column_names and len(set(map(str, data["id"]))) < len(data):
            raise ArgumentError(f"source: '{folder}': ids in its column 'id' stand more than once")

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        """SHA-256 of the saved files, and of the pictures that they only name; read when it is first asked for."""
        import datasets

        digest = hashlib.sha256(self._data._fingerprint.encode())
        for file in self._data.cache_files:
            digest.update(_file_digest(Path(file["filename"])))
        pictures = self._pictures
        if isinstance(pictures.features["image"], datasets.Image):
            pictures = pictures.cast_column("image", datasets.Image(decode=False))
        for row in pictures:
            value = row["image"]
            if isinstance(value, dict) and value.get("bytes") is None:
                value = value.get("path")
            if isinstance(value, str):
                digest.update(_file_digest(Path(value)))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def _sample(self, index: int) -> Sample:
        row = self._texts[index]
        question, answer, kind = row["question"], row.get("answer"), row.get("kind")
        if not isinstance(question, str) or not question.strip():
            raise self._bad(index, f"has {question!r} as its question where some text is expected")
        for name, value in (("answer", answer), ("kind", kind)):
            if value is not None and not isinstance(value, str):
                raise self._bad(index, f"has {value!r} as its {name} where text, or nothing, is expected")

        def load() -> Image.Image:
            try:
                return load_picture(self._pictures[index]["image"])
            except Exception as error:  # datasets decodes on access, with Pillow's many errors.
                raise self._bad(index, one_line(error)) from error

        return Sample(str(row.get("id", index)), question, answer, kind, None, load)

    def _bad(self, index: int, what: str) -> ArgumentError:
        return ArgumentError(f"source: '{printable(self._folder)}', row {index}: {printable(what)}")


class SceneSource(Source):
    """Questions about generated scenes.

    A group of questions, one of each kind, starts at a scene of its own: the kinds that it does not allow are asked of
    the scenes that follow it. So any sample can be had without those before it, and a scene is painted once for the
    questions of its group.
    """

    def __init__(self, split: str, count: int, seed: int, kinds: Sequence[str]) -> None:
        self.spec = f"scenes:{split}?count={count}&seed={seed}&kinds={','.join(kinds)}"
        self.digest = hashlib.sha256(self.spec.encode()).hexdigest()
        self._count = count
        self._kinds = tuple(kinds)
        first = SPLITS[split].start + seed * SCENES_PER_SEED

        @lru_cache(maxsize=16)
        def group(number: int) -> list[tuple[Image.Image, scenes.Question, int]]:
            start = first + number * SCENES_PER_GROUP
            return _questions_of_group(start, self._kinds)

        self._group = group

    @classmethod
    def parse(cls, spec: str) -> SceneSource:
        """Of "scenes:SPLIT?count=N&…"; see `open_source`."""
        split, _, query = spec.removeprefix("scenes:").partition("?")
        if split not in SPLITS:
            raise ArgumentError(f"source: '{spec}' names no split; expected scenes:{'|'.join(SPLITS)}?count=N")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        except ValueError as error:
            raise ArgumentError(f"source: '{spec}': {one_line(error)}; expected count=N&seed=K") from error
        options = dict(pairs)
        known = ("count", "seed", "kinds", "without")
        unknown = [name for name in options if name not in known]
        if unknown or len(options) < len(pairs):
            what = f"has no option {unknown[0]!r}" if unknown else "names an option twice"
            raise ArgumentError(f"source: '{spec}' {what}; its options are {', '.join(known)}")
        if "count" not in options:
            raise ArgumentError(f"source: '{spec}' does not say how many questions; add count=N")
        if {"kinds", "without"} <= options.keys():
            raise ArgumentError(f"source: '{spec}': give kinds or without, not both")
        names = [name for key in ("kinds", "without") for name in options.get(key, "").split(",") if key in options]
        wrong = [name for name in names if name not in scenes.KINDS]
        if wrong:
            raise ArgumentError(f"source: '{spec}': no kind {wrong[0]!r}; there are {', '.join(scenes.KINDS)}")
        kinds = [kind for kind in scenes.KINDS if ("kinds" not in options) == (kind not in names)]
        if not kinds:
            raise ArgumentError(f"source: '{spec}' leaves no kind of question")
        most = SCENES_PER_SEED // SCENES_PER_GROUP * len(kinds)
        seeds = len(SPLITS[split]) // SCENES_PER_SEED
        return cls(
            split,
            _number(spec, "count", options["count"], 1, most),
            _number(spec, "seed", options.get("seed", "0"), 0, seeds - 1),
            kinds,
        )

    def __len__(self) -> int:
        return self._count

    def _sample(self, index: int) -> Sample:
        group, place = divmod(index, len(self._kinds))
        picture, question, seed = self._group(group)[place]
        return Sample(
            f"{index}-scene-{seed}", question.text, question.answer, question.kind, question.mask, picture.copy
        )


def _file_digest(path: Path) -> bytes:
    """SHA-256 of a file; one that is not there or cannot be read has a digest too, which is no file's."""
    try:
        found = path.stat()
        return _bytes_digest(path, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):
        return b"no file"


@lru_cache(maxsize=1 << 20)
def _bytes_digest(path: Path, size: int, changed: int) -> bytes:
    """Of a file of this size and time; known ones are not read again by this process."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()


def _questions_of_group(start: int, kinds: Sequence[str]) -> list[tuple[Image.Image, scenes.Question, int]]:
    """(picture, question, scene seed) of each kind, about the first scene from ``start`` on that allows it."""
    found: dict[str, tuple[Image.Image, scenes.Question, int]] = {}
    seed = start
    while len(found) < len(kinds):
        scene = scenes.generate_scene(seed)
        for kind in kinds:
            if kind not in found:
                # A generator for each kind: a question does not depend on which others are asked.
                question = scenes.ask(scene, kind, np.random.default_rng([seed, 1, scenes.KINDS.index(kind)]))
                if question is not None:
                    found[kind] = scene.image, question, seed
        seed += 1
    return [found[kind] for kind in kinds]


def _number(spec: str, name: str, text: str, least: int, most: int) -> int:
    value = int(text) if text.isdecimal() else -1
    if not least <= value <= most:
        raise ArgumentError(f"source: '{spec}': {name}: expected {least} … {most}, got {text!r}")
    return value
