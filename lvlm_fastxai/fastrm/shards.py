"""Files of relevancy maps: one safetensors file for a fixed run of samples, and an index once all are there.

A shard's bytes follow from its samples, the model and the settings: no time, host or process is in it. It holds its own
SHA-256, so that a damaged one is found before there is an index.

Relevancy is kept in fp16. Its entries are far below what fp16 can hold, so each row is scaled by a power of two, which
is exact, that brings its largest entry to 2¹⁴ … 2¹⁵; entries 2²⁹ times smaller still have all of fp16's digits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, FastXAIError, one_line, printable
from ..files import write_whole

SCHEMA = "lvlm_fastxai.maps/1"
INDEX = "index.json"
PATTERN = "maps-[0-9]*.safetensors"
SCALED_EXPONENT = 15  # a row's largest entry lies in 2¹⁴ … 2¹⁵ when stored
# safetensors writes the entries of its metadata in no fixed order: there is one only.
_ENTRY = "lvlm_fastxai"
# Settings in which the shards of one set must agree, and what to call them. Names are not among them: a checkpoint or
# a source may be moved.
IDENTITY = {
    "schema": "format",
    "version": "version of lvlm_fastxai",
    "model_fingerprint": "model",
    "dtype": "dtype",
    "source_digest": "source",
    "samples": "number of samples",
    "method": "method",
    "row_tolerance": "row tolerance",
    "answers": "kind of answers",
    "max_new_tokens": "longest answer",
    "shard_size": "shard size",
}


class DamagedShardError(FastXAIError, OSError):
    """A file of maps is not what was written."""


@dataclass(frozen=True)
class MapRecord:
    """The maps of one answer.

    Attributes:
        index: of the sample in its source.
        id: of the sample.
        answer: its text.
        token_ids: its T tokens; none where the model said nothing.
        targets_right: whether the answer is the reference answer, white space and case aside; None without one.
        maps: (T, n) fp32, raw relevancy of the n image columns, in the order of the sequence, to fp16's precision.
        grid: (h, w) of the finest grid of the picture's tokens; n = h · w where a family has one grid.
    """

    index: int
    id: str
    answer: str
    token_ids: list[int]
    targets_right: bool | None
    maps: NDArray[np.float32]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """A shard as read: ``settings`` of the whole set, its samples' range, and its records."""

    settings: dict[str, Any]
    start: int
    stop: int
    records: list[MapRecord]


def shard_name(number: int) -> str:
    """Name the file of the shard with this number."""
    return f"maps-{number:05d}.safetensors"


def shard_count(settings: Mapping[str, Any]) -> int:
    """Count the shards of a finished set.

    Example:
        >>> shard_count({"samples": 9, "shard_size": 4})
        3
    """
    return -(-int(settings["samples"]) // int(settings["shard_size"]))


def first_difference(settings: Mapping[str, Any], others: Mapping[str, Any]) -> str | None:
    """Name the first setting of `IDENTITY` in which two sets of maps differ; None where they are of one set."""
    return next((name for name in IDENTITY if settings.get(name) != others.get(name)), None)


def encode_shard(settings: Mapping[str, Any], start: int, records: Sequence[MapRecord]) -> bytes:
    """Encode a shard that holds the samples from ``start`` on.

    Args:
        settings: of the set, to be written as JSON.
        start: index of the first record.
        records: one after the other, none left out; their maps of any floating dtype.
    """
    from safetensors.numpy import save

    rows = [row for record in records for row in np.asarray(record.maps)]
    exponents = np.array([_exponent(row) for row in rows], dtype=np.int16)
    scaled = [
        np.ldexp(row.astype(np.float64), int(e)).astype(np.float16) for row, e in zip(rows, exponents, strict=True)
    ]
    arrays = {
        "maps": np.concatenate(scaled) if scaled else np.zeros(0, dtype=np.float16),
        "exponents": exponents,
        "columns": np.array([np.shape(record.maps)[1] for record in records], dtype=np.int32),
        "grids": np.array([record.grid for record in records], dtype=np.int32).reshape(-1, 2),
        "lengths": np.array([len(record.token_ids) for record in records], dtype=np.int32),
        "tokens": np.array([token for record in records for token in record.token_ids], dtype=np.int32),
    }
    header = {
        "settings": dict(settings),
        "start": start,
        "stop": start + len(records),
        "ids": [record.id for record in records],
        "answers": [record.answer for record in records],
        "targets_right": [record.targets_right for record in records],
    }
    header["sha256"] = _digest(header, arrays)
    return save(arrays, metadata={_ENTRY: _json(header)})


def decode_shard(data: bytes) -> Shard:
    """Decode what `encode_shard` gave.

    Raises:
        DamagedShardError: the bytes are not those that were written.
    """
    from safetensors.numpy import load

    try:
        header = _header(data[8 : 8 + int.from_bytes(data[:8], "little")])
        arrays = load(data)
        digest = header.pop("sha256")
    except Exception as error:  # whatever damage makes of the bytes
        raise DamagedShardError(f"cannot be read: {one_line(error)}") from error
    if digest != _digest(header, arrays):
        raise DamagedShardError("its checksum does not fit its contents")
    lengths, columns = arrays["lengths"], arrays["columns"]
    tokens = np.split(arrays["tokens"], np.cumsum(lengths)[:-1])
    exponents = np.split(arrays["exponents"], np.cumsum(lengths)[:-1])
    values = np.split(arrays["maps"], np.cumsum(lengths * columns)[:-1])
    records = [
        MapRecord(
            header["start"] + place,
            header["ids"][place],
            header["answers"][place],
            tokens[place].tolist(),
            header["targets_right"][place],
            np.ldexp(
                values[place].astype(np.float32).reshape(lengths[place], columns[place]),
                -exponents[place][:, None].astype(np.int32),
            ),
            (int(arrays["grids"][place, 0]), int(arrays["grids"][place, 1])),
        )
        for place in range(len(lengths))
    ]
    return Shard(header["settings"], header["start"], header["stop"], records)


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(json.loads(data)["__metadata__"][_ENTRY])
    return header


def _check_header(path: Path, settings: Mapping[str, Any], start: int) -> None:
    """Refuse a file of other maps, by its header alone; nothing else of it is read.

    Raises:
        DamagedShardError: it is of other maps or other samples, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = _header(file.read(int.from_bytes(file.read(8), "little")))
        different = first_difference(header["settings"], settings)
        what = None if different is None else f"another {IDENTITY[different]}"
        if what is None and header["start"] != start:
            what = "other samples"
    except Exception as error:  # whatever damage makes of the bytes
        raise DamagedShardError(f"'{printable(path)}' cannot be read: {one_line(error)}; {_again()}") from error
    if what is not None:
        raise DamagedShardError(
            f"'{printable(path)}' is of other maps than those around it: it has {what}; remove it, and {_again()}"
        )


def read_shard(path: Path) -> Shard:
    """Read the shard in a file.

    Raises:
        DamagedShardError: it is not what was written; the message names the file.
    """
    try:
        return decode_shard(path.read_bytes())
    except DamagedShardError as error:
        raise DamagedShardError(f"'{printable(path)}' {error}") from error


class MapSet(Sequence[MapRecord]):
    """A finished set of maps.

    Every file's header is compared with the index at once, all of its bytes when they are first needed.

    Args:
        folder: as `lvlm-fastxai fastrm build-maps` has written it.

    Attributes:
        settings: everything the maps depend on, by name, of which the following are the most used.
        model, model_fingerprint: name of the model that was explained, and `lvlm_fastxai.models.fingerprint` of it.
        method, row_tolerance: of the maps.
        answers: "model" or "reference", whose answers were explained.
        source_spec, source_digest: `Source.spec` and `Source.digest`.

    Raises:
        ArgumentError: there are no maps, or not all of them; the message says how to finish.
        DamagedShardError: a file is of other maps than the index lists.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise ArgumentError(_unfinished(self.folder))
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.settings: dict[str, Any] = index["settings"]
            self._shards: list[dict[str, Any]] = index["shards"]
            schema = self.settings["schema"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArgumentError(
                f"maps: '{printable(path)}' is no index of maps: {one_line(error)}; {_again()}"
            ) from error
        if schema != SCHEMA:
            raise ArgumentError(f"maps: '{self.folder}' holds {schema}, and this version reads {SCHEMA}; {_again()}")
        missing = [shard["file"] for shard in self._shards if not (self.folder / shard["file"]).is_file()]
        if missing:
            raise ArgumentError(
                f"maps: {len(missing)} of the {len(self._shards)} files in '{self.folder}' are gone, such as "
                f"{missing[0]}; {_again()}"
            )
        for shard in self._shards:
            _check_header(self.folder / shard["file"], self.settings, shard["start"])
        self.model: str = self.settings["model"]
        self.model_fingerprint: str = self.settings["model_fingerprint"]
        self.method: str = self.settings["method"]
        self.row_tolerance: float | str = self.settings["row_tolerance"]
        self.answers: str = self.settings["answers"]
        self.source_spec: str = self.settings["source"]
        self.source_digest: str = self.settings["source_digest"]
        self._verified: set[int] = set()
        self._read = lru_cache(maxsize=16)(self._read_shard)

    def __len__(self) -> int:
        return int(self.settings["samples"])

    def __getitem__(self, index: Any) -> Any:
        """Read the record of a sample, or those of a slice.

        Raises:
            DamagedShardError: its file is not the one that was written.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard, place = divmod(number, self.settings["shard_size"])
        return self._read(shard)[place]

    def records(self) -> Iterator[MapRecord]:
        """Yield all records in the order of the source, each file read once."""
        for shard in range(len(self._shards)):
            yield from self._read(shard)

    def _read_shard(self, number: int) -> list[MapRecord]:
        entry = self._shards[number]
        path = self.folder / entry["file"]
        data = path.read_bytes()
        if number not in self._verified and hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise DamagedShardError(f"'{path}' is not the file that {INDEX} lists; {_again()}")
        self._verified.add(number)
        return decode_shard(data).records


def open_maps(folder: str | Path) -> MapSet:
    """Open the maps that `lvlm-fastxai fastrm build-maps` has written; see `MapSet`."""
    return MapSet(folder)


def write_index(folder: Path, settings: Mapping[str, Any]) -> None:
    """List the shards of a finished set with the SHA-256 of each file, as ``sha256sum`` gives it.

    Raises:
        DamagedShardError: a file is of other maps.
    """
    entries = []
    for number in range(shard_count(settings)):
        name = shard_name(number)
        start = number * settings["shard_size"]
        _check_header(folder / name, settings, start)
        entries.append(
            {
                "file": name,
                "samples": min(settings["shard_size"], settings["samples"] - start),
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
                "start": start,
            }
        )
    text = json.dumps({"settings": dict(settings), "shards": entries}, sort_keys=True, indent=1, ensure_ascii=False)
    write_whole(folder / INDEX, (text + "\n").encode(), argument="--out")


def _exponent(row: NDArray[np.floating]) -> int:
    """e for which the largest entry of row · 2ᵉ lies in 2¹⁴ … 2¹⁵."""
    largest = float(np.abs(row).max(initial=0.0))
    return SCALED_EXPONENT - int(np.frexp(largest)[1]) if largest else 0


def _digest(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(_json(header).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _again() -> str:
    return "run the `lvlm-fastxai fastrm build-maps` that wrote it again, it computes what is missing"


def _unfinished(folder: Path) -> str:
    paths = sorted(folder.glob(PATTERN)) if folder.is_dir() else []
    for path in paths:
        try:
            settings = read_shard(path).settings
            total = shard_count(settings)
            command = f"lvlm-fastxai fastrm build-maps '{settings['source']}' --out '{folder}'"
        except (DamagedShardError, KeyError):
            continue
        return (
            f"maps: '{folder}' is not finished: {max(total - len(paths), 0)} of its {total} files of maps are missing; "
            f"run the command that began it again, `{command}` with its own options, and it goes on"
        )
    return f"maps: '{folder}' holds no maps; write some with `lvlm-fastxai fastrm build-maps SOURCE --out '{folder}'`"
