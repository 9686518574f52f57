"""Write the exact relevancy maps of a source's answers as shards.

A shard is a fixed run of samples and the unit of work: which process computes it changes nothing in it, and a run that
was stopped goes on with the shards that are not there. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError, printable
from ..files import lock_folder, remove_scratch, write_whole
from ..prompting.sources import Sample, Source
from ..training.processes import agree, join_processes
from .defaults import ANSWERS, BATCH, MAX_NEW_TOKENS, METHODS, SHARD_SIZE
from .shards import (
    IDENTITY,
    INDEX,
    PATTERN,
    SCHEMA,
    DamagedShardError,
    MapRecord,
    encode_shard,
    first_difference,
    read_shard,
    shard_count,
    shard_name,
    write_index,
)

if TYPE_CHECKING:
    from ..prompting.answering import Answerer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Built:
    """What a call of `build_maps` has done, all processes together.

    Attributes:
        folder: of the maps.
        samples, shards: in the finished set.
        found: samples whose maps were there already.
        damaged: names of files that were not what had been written and were computed again.
        seconds: that it took.
    """

    folder: str
    samples: int
    shards: int
    found: int
    damaged: list[str]
    seconds: float


def build_maps(
    model: Any,
    processor: Any,
    source: Source,
    folder: str | Path,
    *,
    method: str = "chefer",
    row_tolerance: float | str = 0.0,
    answers: str = "model",
    batch: int = BATCH,
    shard_size: int = SHARD_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Built:
    """Write the relevancy maps of every answer token for every sample of a source; `open_maps` reads them.

    Under ``torchrun`` or ``accelerate launch`` every process makes the same call with its own copy of the model and
    computes its share of the shards; all need the same folder. Called again on an unfinished folder, it computes what
    is missing. The files are the same to the last byte however many processes wrote them and however often they were
    stopped, as far as the model's own arithmetic is: on the same kind of device, with as many threads and the same
    batch.

    Args:
        model: a transformers image-text-to-text model of a known family; left as it was found.
        processor: its processor, with a chat template.
        source: what to ask.
        folder: where the files go; made where it is not there.
        method: one of `METHODS`, those whose maps a head may learn.
        row_tolerance: 0 for exact maps, ε > 0 or "auto" for pruned ones; see `lvlm_fastxai.relevancy_rows`.
        answers: "model" explains the model's own greedy answers, right or wrong, which are what a head sees when it is
            used; "reference" explains the source's, where it has one, as if the model had given it.
        batch: samples per pass.
        shard_size: samples per file; a crash loses the files in work, one per process.
        max_new_tokens: longest answer of the model.
        progress: called on the first process as ``progress(done, total)`` with the samples that all have done.
        say: takes lines for the user, on the first process.

    Raises:
        ArgumentError: a bad argument; a folder with other maps; a picture that cannot be read; a processor without a
            chat template; accelerate is not installed.
        UnsupportedModelError, UnknownFamilyError: the model cannot be explained.
    """
    from .. import __version__
    from ..explain.relevancy_rows import check_row_tolerance
    from ..models.fingerprint import fingerprint, model_name
    from ..prompting.answering import Answerer

    began = time.perf_counter()
    check_row_tolerance(row_tolerance)
    _check_choice("method", method, METHODS)
    _check_choice("answers", answers, ANSWERS)
    for name, value in (("batch", batch), ("shard_size", shard_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    answerer = Answerer(model, processor)
    settings = {
        "schema": SCHEMA,
        "version": __version__,
        "model": model_name(model),
        "model_fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "source": source.spec,
        "source_digest": source.digest,
        "samples": len(source),
        "method": method,
        "row_tolerance": row_tolerance if isinstance(row_tolerance, str) else float(row_tolerance),
        "answers": answers,
        "max_new_tokens": max_new_tokens,
        "shard_size": shard_size,
    }
    state = join_processes(model.device.type)
    with ExitStack() as held:
        # Only the first process decides, and so only it holds the lock, for all of them.
        missing, damaged = agree(state, lambda: _claim(held, Path(folder), settings))
        speaks = state.is_main_process
        work = _Work(answerer, source, Path(folder), settings, batch, missing, progress if speaks else None)
        if speaks:
            for line in damaged:
                say(f"damaged, computed again: {line}")
            if work.found:
                say(f"{work.found} of {len(source)} samples are there already")
        work.run(missing[state.process_index :: state.num_processes])
        state.wait_for_everyone()
        if speaks:
            write_index(work.folder, settings)
            work.report()
    shards = shard_count(settings)
    return Built(str(folder), len(source), shards, work.found, damaged, time.perf_counter() - began)


class _Work:
    """The shards that one call of `build_maps` computes, and the count of what all processes have done."""

    def __init__(
        self,
        answerer: Answerer,
        source: Source,
        folder: Path,
        settings: dict[str, Any],
        batch: int,
        missing: Sequence[int],
        progress: Progress | None,
    ) -> None:
        self.folder = folder
        self._answerer, self._source, self._settings, self._batch = answerer, source, settings, batch
        self._missing, self._progress = missing, progress
        self.found = len(source) - sum(map(self._size, missing))

    def run(self, numbers: Sequence[int]) -> None:
        """Compute and write these shards."""
        self.report()
        for number in numbers:
            start = number * self._settings["shard_size"]
            samples = self._source[start : start + self._size(number)]
            records = _explain_shard(self._answerer, samples, start, self._settings, self._batch, self.report)
            data = encode_shard(self._settings, start, records)
            write_whole(self.folder / shard_name(number), data, argument="--out")
            self.report()

    def report(self, within: int = 0) -> None:
        """Tell how many samples are done, ``within`` of them in a shard that is not written yet."""
        if self._progress is not None:
            done = sum(self._size(number) for number in self._missing if (self.folder / shard_name(number)).exists())
            self._progress(self.found + done + within, len(self._source))

    def _size(self, number: int) -> int:
        size: int = self._settings["shard_size"]
        return min(size, len(self._source) - number * size)


def _claim(held: ExitStack, folder: Path, settings: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Keep other runs out of the folder for as long as ``held`` lasts, and find out what is to be done."""
    held.enter_context(lock_folder(folder, argument="--out"))
    return _prepare(folder, settings)


def _prepare(folder: Path, settings: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Find the numbers of the shards that are to be computed, and remove those that are there but damaged.

    Raises:
        ArgumentError: the folder holds maps of another kind.
    """
    numbers = {shard_name(number): number for number in range(shard_count(settings))}
    damaged = []
    for path in sorted(folder.glob(PATTERN)):
        try:
            shard = read_shard(path)
        except DamagedShardError as error:
            if path.name in numbers:
                damaged.append(path.name)
                continue
            raise ArgumentError(f"--out: {error}, and belongs to no maps of this source; remove it") from error
        name = first_difference(shard.settings, settings)
        if name is not None:
            what = IDENTITY[name]
            raise ArgumentError(
                f"--out: '{printable(folder)}' holds maps with another {what}: {_shown(shard.settings, name)} in "
                f"{path.name}, {_shown(settings, name)} now; give another folder, or remove this one to begin anew"
            )
        if numbers.get(path.name) != shard.start // settings["shard_size"]:
            damaged.append(path.name)  # renamed or copied over another
    for name in damaged:
        (folder / name).unlink()
    remove_scratch(folder)
    missing = [number for name, number in numbers.items() if not (folder / name).exists()]
    if missing:
        (folder / INDEX).unlink(missing_ok=True)  # it would promise files that are not there
    return missing, damaged


def _shown(settings: dict[str, Any], name: str) -> str:
    """A setting for people, who know models and sources by their names."""
    title = {"model_fingerprint": "model", "source_digest": "source"}.get(name)
    value = str(settings.get(name))
    return value if title is None else f"{settings.get(title)} ({value[:12]})"


def _explain_shard(
    answerer: Answerer,
    samples: Sequence[Sample],
    start: int,
    settings: dict[str, Any],
    batch: int,
    report: Callable[[int], None],
) -> list[MapRecord]:
    """The records of consecutive samples, in batches that follow from these samples alone."""
    from ..prompting.answering import batched, same_answer

    tokens: list[list[int]] = [[] for _ in samples]
    asked = list(range(len(samples)))
    if settings["answers"] == "reference":
        for place, sample in enumerate(samples):
            if sample.answer is not None:
                tokens[place] = answerer.encode_answer(sample.answer, f"source: sample {sample.id}: answer")
        asked = [place for place in asked if not tokens[place]]
    for part in batched(asked, batch):
        prompts = _encode(answerer, [samples[place] for place in part])[0]
        for place, answer in zip(part, answerer.answer(prompts, settings["max_new_tokens"]), strict=True):
            tokens[place] = answer
    # Answers of one length share a batch, so that no pass carries targets that only one sample has.
    by_length: dict[int, list[int]] = {}
    for place, answer in enumerate(tokens):
        by_length.setdefault(len(answer), []).append(place)
    records: dict[int, MapRecord] = {}
    for _, members in sorted(by_length.items()):
        for part in batched(members, batch):
            explained = _explain_batch(
                answerer, [samples[place] for place in part], [tokens[place] for place in part], settings
            )
            for place, (rows, grid) in zip(part, explained, strict=True):
                sample, text = samples[place], answerer.decode(tokens[place])
                right = None if sample.answer is None else same_answer(text, sample.answer)
                records[place] = MapRecord(start + place, sample.id, text, tokens[place], right, rows, grid)
            report(len(records))
    return [records[place] for place in range(len(samples))]


def _explain_batch(
    answerer: Answerer, samples: Sequence[Sample], answers: Sequence[Sequence[int]], settings: dict[str, Any]
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """(T, n) rows at the image columns and the grid's shape, for samples whose answers all have T tokens."""
    from ..explain.relevancy_rows import explain_rows

    prompts, images = _encode(answerer, samples)
    layouts = [layout for (layout,) in answerer.image_layouts(prompts, [[image] for image in images])]
    columns = [answerer.image_columns(prompts, place) for place in range(len(samples))]
    length, first = len(answers[0]), prompts["input_ids"].shape[1]
    if length == 0:
        for layout, inside in zip(layouts, columns, strict=True):
            yield np.zeros((0, len(inside)), dtype=np.float32), layout.shape
        return
    rows = explain_rows(
        answerer.model,
        answerer.accepted(answerer.join(prompts, answers)),
        [(place, first + step - 1, token) for place, answer in enumerate(answers) for step, token in enumerate(answer)],
        method=settings["method"],
        row_tolerance=settings["row_tolerance"],
        prompt_length=first,
    ).rows
    found = rows.cpu().numpy().reshape(len(samples), length, -1)
    for sample, layout, inside, own in zip(samples, layouts, columns, found, strict=True):
        if not np.isfinite(own).all():
            raise ArgumentError(
                f"model: relevancy of sample {sample.id} is NaN or infinite; check the weights and the dtype"
            )
        yield own[:, inside], layout.shape


def _encode(answerer: Answerer, samples: Sequence[Sample]) -> tuple[dict[str, Any], list[Any]]:
    images = [sample.picture() for sample in samples]
    called = [f"source: sample {sample.id}" for sample in samples]
    return answerer.encode(images, [sample.question for sample in samples], called), images


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
