"""build-maps: what each source gives, that fp16 keeps the maps, and that no stop or process count changes a byte."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lvlm_fastxai as fx
from lvlm_fastxai.errors import ArgumentError, UnsupportedModelError
from lvlm_fastxai.fastrm import build_command
from lvlm_fastxai.fastrm.build import Built, build_maps
from lvlm_fastxai.fastrm.shards import (
    INDEX,
    DamagedShardError,
    MapRecord,
    decode_shard,
    encode_shard,
    open_maps,
    shard_name,
    write_index,
)
from lvlm_fastxai.models.fingerprint import PIECE, fingerprint, model_name
from lvlm_fastxai.prompting.answering import Answerer
from lvlm_fastxai.prompting.sources import open_source
from lvlm_fastxai.tiny import SAMPLE_IMAGE, scenes

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = "scenes:held-out?count=24&seed=9&kinds=color,relation,position"
SIZES: dict[str, Any] = {"shard_size": 2, "batch": 2}
SHARDS = 12


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return fx.load_tiny_lvlm()


@pytest.fixture(scope="module")
def whole(lvlm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one process that nothing stops writes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    build_maps(*lvlm, open_source(SPEC), folder, **SIZES)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "maps"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Fingerprint


def test_a_fingerprint_is_of_the_weights_alone(lvlm: tuple[Any, Any]) -> None:
    model, _ = fx.load_tiny_lvlm()
    found = fingerprint(model)
    assert found == fingerprint(lvlm[0]) and re.fullmatch("v2-[0-9a-f]{16}", found)
    assert fingerprint(model.bfloat16()) == found
    assert fingerprint(model.half()) == found  # of a bf16 model


@pytest.mark.parametrize("place", [0, 1, 12345, 70_001, -1])
def test_every_value_counts(place: int) -> None:
    """Also the many that lie between evenly spaced ones, and those behind the first piece that is read."""
    torch.manual_seed(0)
    models = [nn.Linear(700, 1600, bias=False) for _ in range(2)]
    assert models[0].weight.numel() > PIECE
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        models[1].weight.view(-1)[place] += 1
    first, second = map(fingerprint, models)
    assert first != second
    models[1].load_state_dict(models[0].state_dict())
    assert fingerprint(models[1]) == first


def test_a_known_fingerprint_is_not_that_of_changed_weights() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    seen = [fingerprint(model)]

    def is_new() -> bool:
        seen.append(fingerprint(model))
        return seen[-1] not in seen[:-1] and seen[-1] == fingerprint(copy_of(model))

    with torch.no_grad():
        model[0].weight[3, 5] += 1  # counted by torch
    assert is_new()
    model[0].weight.data *= 1.5  # not counted
    assert is_new()
    model[0].weight.data = torch.randn(40, 40)
    assert is_new()
    model[1].weight = nn.Parameter(torch.randn(40, 40))
    assert is_new()
    assert fingerprint(model) == seen[-1]


def copy_of(model: nn.Sequential) -> nn.Sequential:
    other = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    other.load_state_dict(model.state_dict())
    return other


def test_a_fingerprint_does_not_depend_on_the_order_in_memory() -> None:
    weight = torch.randn(1100, 1000)
    turned = nn.ParameterList([weight.T.contiguous().T])
    assert turned[0].numel() > PIECE and not turned[0].is_contiguous()
    assert fingerprint(turned) == fingerprint(nn.ParameterList([weight]))
    integers = [nn.Parameter(torch.arange(n, n + 9, dtype=torch.int32), requires_grad=False) for n in (0, 1000)]
    assert fingerprint(nn.ParameterList(integers[:1])) != fingerprint(nn.ParameterList(integers[1:]))


def test_a_fingerprint_knows_neither_names_nor_ties() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = first.weight
    assert fingerprint(nn.ModuleDict({"a": first, "b": second})) == fingerprint(nn.ModuleList([second, first]))
    one_weight = nn.ParameterList([first.weight, first.bias, tied.bias])
    assert fingerprint(nn.ModuleList([first, tied])) == fingerprint(one_weight)
    assert fingerprint(nn.ParameterList([torch.zeros(4, 2)])) != fingerprint(nn.ParameterList([torch.zeros(2, 4)]))
    once, twice = nn.ParameterList([torch.zeros(2)]), nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    assert fingerprint(once) != fingerprint(twice)


def test_weights_elsewhere_have_no_fingerprint() -> None:
    with pytest.raises(UnsupportedModelError, match="weight"):
        fingerprint(nn.Linear(2, 2, device="meta"))


def test_a_models_name_holds_no_folder(lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    assert model_name(lvlm[0]) == "the shipped LVLM"
    module: Any = nn.Linear(1, 1)
    assert model_name(module) == "Linear"
    module.name_or_path = str(tmp_path / "llava")
    assert model_name(module) == "llava"


# Sources


def write_lines(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGBA", (5, 4), (255, 0, 0, 0)).save(tmp_path / "pictures" / "a.png")
    path = write_lines(
        tmp_path / "data.jsonl",
        {"image": "pictures/a.png", "question": "what?", "answer": "this", "kind": "k", "id": 7, "decision": "right"},
        "",
        {"image": "gone.png", "question": "wo — ?", "answer": None},
        {"image": "notes.txt", "question": "why?"},
    )
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_source(str(path))
    assert source.spec == "data.jsonl"
    assert [sample.id for sample in source] == ["7", "line-3", "line-4"]
    first, second, third = source
    assert (first.question, first.answer, first.kind, first.mask) == ("what?", "this", "k", None)
    assert (second.question, second.answer, second.kind) == ("wo — ?", None, None)
    assert first.picture().mode == "RGB" and first.picture().getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ArgumentError, match="line 3: image: there is no file"):
        second.picture()
    with pytest.raises(ArgumentError, match="line 4: image: cannot read"):
        third.picture()
    digest = source.digest
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert open_source(str(path)).digest == digest
    path.write_bytes(path.read_bytes().replace(b"this", b"that"))
    assert open_source(str(path)).digest != digest


def test_a_source_with_another_picture_is_another_source(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"image": "a.png", "question": "what?"})
    seen = {open_source(str(path)).digest}  # the picture is not there yet
    for color in ("red", "blue"):
        Image.new("RGB", (5, 4), color).save(tmp_path / "a.png")
        seen.add(open_source(str(path)).digest)
    assert len(seen) == 3
    os.utime(tmp_path / "a.png")
    assert open_source(str(path)).digest in seen


def test_a_saved_data_set_with_other_bytes_is_another_source(tmp_path: Path) -> None:
    """Whatever `datasets` calls it: its own fingerprint is kept beside the data."""
    datasets = pytest.importorskip("datasets")
    picture = Image.new("RGB", (5, 4), "red")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": [picture], "question": ["what?"]}, features=features)
    data.save_to_disk(str(tmp_path / "set"))
    first = open_source(str(tmp_path / "set")).digest
    assert open_source(str(tmp_path / "set")).digest == first
    (file,) = (tmp_path / "set").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"what?", b"whom?"))
    assert open_source(str(tmp_path / "set")).digest != first


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"image": "a.png", "question": "\\ud800?"}', "a lone surrogate, in its 'question'"),
        ('{"image": "a\\ud800.png", "question": "?"}', "a lone surrogate, in its 'image'"),
        ('{"image": "a.png"', "is not JSON"),
        ("[1]", "not an object with the keys image and question, but list"),
        ({"question": "q"}, "has null as its 'image'"),
        ({"image": "a.png", "question": " "}, "has \" \" as its 'question'"),
        ({"image": "a.png", "question": "q", "answer": 3}, "has 3 as its 'answer'"),
        ({"image": "a.png", "question": "q", "id": True}, "has true as its 'id'"),
        ({"image": "a.png", "question": "q", "id": "line-1"}, "has the id 'line-1' of line 1"),
    ],
)
def test_a_malformed_line_is_named(line: Any, reason: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"image": "a.png", "question": "q"}, line)
    with pytest.raises(ArgumentError, match="line 2: ") as caught:
        open_source(str(path))
    assert reason in str(caught.value) and str(caught.value).isprintable()


def test_a_name_that_is_not_utf8_is_printable(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jsonl")
    try:
        write_lines(Path(path), {"image": "a\udcff.png", "question": "q"})
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    source = open_source(path)
    assert source.spec == "a\\xff.jsonl" and source.digest
    with pytest.raises(ArgumentError, match="line 1: image: there is no file") as caught:
        source[0].picture()
    assert str(caught.value).isprintable()


def test_files_without_samples(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="holds no sample"):
        open_source(str(write_lines(tmp_path / "data.jsonl", "")))
    with pytest.raises(ArgumentError, match="cannot read"):
        (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
        open_source(str(tmp_path / "data.jsonl"))
    with pytest.raises(ArgumentError, match="there is no"):
        open_source(str(tmp_path / "other.jsonl"))


def test_a_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    pictures = [Image.new("RGB", (6, 5), color) for color in ("red", "blue")]
    rows = {"image": pictures, "question": ["what?", "who?"], "answer": ["red", None]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "set"))
    source = open_source(str(tmp_path / "set"))
    assert source.spec == "set" and len(source) == 2
    assert [(s.id, s.question, s.answer) for s in source] == [("0", "what?", "red"), ("1", "who?", None)]
    assert source[1].picture().getpixel((0, 0)) == (0, 0, 255)
    assert source.digest == open_source(str(tmp_path / "set")).digest
    data.select([1, 0]).save_to_disk(str(tmp_path / "turned"))
    assert open_source(str(tmp_path / "turned")).digest != source.digest

    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ArgumentError, match="holds the splits train"):
        open_source(str(tmp_path / "splits"))
    assert len(open_source(str(tmp_path / "splits" / "train"))) == 2
    data.remove_columns("question").save_to_disk(str(tmp_path / "mute"))
    with pytest.raises(ArgumentError, match="has no column question"):
        open_source(str(tmp_path / "mute"))
    data.add_column("id", ["a", "a"]).save_to_disk(str(tmp_path / "twice"))
    with pytest.raises(ArgumentError, match="more than once"):
        open_source(str(tmp_path / "twice"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ArgumentError, match="cannot read"):
        open_source(str(tmp_path / "none"))


def test_scenes_are_the_same_in_any_order() -> None:
    source = open_source("scenes:validation?count=25&seed=2")
    last = open_source("scenes:validation?count=25&seed=2")[24]
    assert source[-1].question == last.question and source[24].id == last.id
    assert np.array_equal(np.asarray(source[24].picture()), np.asarray(last.picture()))
    kinds = [sample.kind for sample in source]
    assert kinds == [scenes.KINDS[index % 10] for index in range(25)]
    assert len({sample.id for sample in source}) == 25
    for sample in source[:20]:
        assert sample.mask is not None and sample.mask.shape == (192, 192)
        assert sample.mask.any() or sample.answer in ("no", "0")
        seed = int(sample.id.split("-")[-1])
        assert seed in scenes.VALIDATION_SEEDS
        assert np.array_equal(np.asarray(sample.picture()), np.asarray(scenes.generate_scene(seed).image))
    with pytest.raises(IndexError):
        source[25]


def test_a_question_about_a_scene_does_not_depend_on_the_other_kinds() -> None:
    every = open_source("scenes:train?count=10")
    some = open_source("scenes:train?count=8&without=comparison,color")
    assert some.spec == open_source("scenes:train?count=8&kinds=" + ",".join(scenes.KINDS[1:7] + scenes.KINDS[8:])).spec
    asked = {sample.kind: sample.question for sample in every}
    assert [sample.question for sample in some] == [asked[sample.kind] for sample in some]
    assert some.digest != every.digest
    assert every[0].question != open_source("scenes:held-out?count=10")[0].question


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("scenes:test?count=1", "names no split"),
        ("scenes:train", "add count=N"),
        ("scenes:train?count", "bad query field"),
        ("scenes:train?count=0", "count: expected 1 … 625000"),
        ("scenes:train?count=1&kinds=color&seed=500", "seed: expected 0 … 499"),
        ("scenes:train?count=1&count=2", "twice"),
        ("scenes:train?count=1&size=3", "no option 'size'"),
        ("scenes:train?count=1&kinds=colour", "no kind 'colour'"),
        ("scenes:train?count=1&kinds=color&without=color", "not both"),
        ("scenes:train?count=1&without=" + ",".join(scenes.KINDS), "leaves no kind"),
    ],
)
def test_a_bad_scene_spec(spec: str, reason: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        open_source(spec)
    assert reason in str(caught.value)


# Files


def some_records() -> list[MapRecord]:
    rng = np.random.default_rng(0)
    # Entries from 1 down to 1e-8 of each row's largest, at levels that fp16 itself could not hold.
    maps = (10.0 ** rng.uniform(-8, 0, (3, 50)) * np.array([[1e-30], [1e-6], [1e6]])).astype(np.float32)
    maps[1, 7] = 0.0
    return [
        MapRecord(10, "a", "grün", [3, 1, 2], True, maps, (5, 10)),
        MapRecord(11, "b", "", [], False, np.zeros((0, 7), dtype=np.float32), (1, 7)),
        MapRecord(12, "c", "x", [2**31 - 1], None, np.zeros((1, 4), dtype=np.float32), (2, 2)),
    ]


def test_a_shard_keeps_records_to_fp16_rounding() -> None:
    records = some_records()
    data = encode_shard({"samples": 3}, 10, records)
    assert data == encode_shard({"samples": 3}, 10, records)
    shard = decode_shard(data)
    assert (shard.settings, shard.start, shard.stop) == ({"samples": 3}, 10, 13)
    for found, written in zip(shard.records, records, strict=True):
        assert [getattr(found, n) for n in ("index", "id", "answer", "token_ids", "targets_right", "grid")] == [
            getattr(written, n) for n in ("index", "id", "answer", "token_ids", "targets_right", "grid")
        ]
        assert found.maps.dtype == np.float32 and found.maps.shape == written.maps.shape
        assert np.all(np.abs(found.maps - written.maps) <= 2.0**-11 * written.maps)


@pytest.mark.parametrize("place", [0, 9, 40, 600, -400, -1])
def test_a_changed_byte_is_found(place: int) -> None:
    data = bytearray(encode_shard({"samples": 3}, 10, some_records()))
    data[place] ^= 1
    with pytest.raises(DamagedShardError):
        decode_shard(bytes(data))


def test_a_shard_cut_short_is_found() -> None:
    data = encode_shard({"samples": 3}, 10, some_records())
    for length in (0, 7, 100, len(data) - 1):
        with pytest.raises(DamagedShardError):
            decode_shard(data[:length])


# Maps


def test_maps_are_those_of_the_explainer(lvlm: tuple[Any, Any], whole: Path) -> None:
    explainer = fx.Explainer(*lvlm)
    source, maps = open_source(SPEC), open_maps(whole)
    assert (maps.source_spec, maps.source_digest) == (source.spec, source.digest)
    assert maps.model_fingerprint == fingerprint(lvlm[0])
    assert (maps.model, maps.method, maps.row_tolerance, maps.answers) == ("the shipped LVLM", "chefer", 0.0, "model")
    assert len(maps) == len(source) and [record.id for record in maps.records()] == [sample.id for sample in source]
    assert any(len(record.token_ids) > 1 for record in maps)
    for index in (0, 1, 2, 23):
        record, sample = maps[index], source[index]
        assert record.index == index
        explanation = explainer(sample.picture(), sample.question)
        assert record.answer == explanation.answer
        assert record.token_ids == [token.token_id for token in explanation.tokens]
        assert record.targets_right == (record.answer == sample.answer)
        assert record.grid == explanation.tokens[0].image_map.shape
        wanted = np.stack([token.image_map.ravel() for token in explanation.tokens])
        # fp16 rounding, and fp32's in another batch.
        np.testing.assert_allclose(record.maps, wanted, rtol=2**-11 + 1e-4, atol=1e-5 * wanted.max())


def test_the_references_answers(lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    right, wrong = "red", "green"
    lines: list[dict[str, Any]] = [
        {"image": str(SAMPLE_IMAGE), "question": "describe the image.", "answer": wrong},
        {"image": str(SAMPLE_IMAGE), "question": "describe the image.", "answer": right},
        {"image": str(SAMPLE_IMAGE), "question": "describe the image."},
    ]
    source = open_source(str(write_lines(tmp_path / "data.jsonl", *lines)))
    build_maps(*lvlm, source, tmp_path / "reference", answers="reference", method="lvlm_interpret")
    build_maps(*lvlm, source, tmp_path / "model", row_tolerance=0.5)
    forced, own = open_maps(tmp_path / "reference"), open_maps(tmp_path / "model")
    assert [record.answer for record in forced[:2]] == [wrong, right]
    assert [record.targets_right for record in forced] == [True, True, None]
    assert forced[2].answer == own[0].answer and own[0].targets_right is False
    assert (forced.method, own.row_tolerance) == ("lvlm_interpret", 0.5)
    assert not np.allclose(forced[0].maps, forced[1].maps, rtol=0.01)
    exact = fx.Explainer(*lvlm)(SAMPLE_IMAGE, "describe the image.").tokens[0].image_map.ravel()
    error = np.abs(own[0].maps[0] - exact).sum() / exact.sum()
    assert 1e-3 < error < 0.6  # pruned, and so not what the exact sweep gives

    answerer = Answerer(*lvlm)
    prompts = answerer.encode([Image.open(SAMPLE_IMAGE).convert("RGB")], ["describe the image."])
    tokens = forced[0].token_ids
    start = prompts["input_ids"].shape[1]
    rows = fx.relevancy_rows(
        lvlm[0],
        answerer.accepted(answerer.join(prompts, [tokens])),
        [(0, start - 1 + step, token) for step, token in enumerate(tokens)],
        method="lvlm_interpret",
        prompt_length=start,
    )[:, answerer.image_columns(prompts, 0)].numpy()
    np.testing.assert_allclose(forced[0].maps, rows, rtol=2**-11 + 1e-4, atol=1e-5 * rows.max())


def test_a_model_that_says_nothing_has_no_maps(
    lvlm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answerer, "answer", lambda self, inputs, most: [[] for _ in inputs["input_ids"]])
    build_maps(*lvlm, open_source("scenes:train?count=2"), tmp_path)
    for record in open_maps(tmp_path):
        assert (record.answer, record.token_ids, record.targets_right) == ("", [], False)
        assert record.maps.shape == (0, 144) and record.grid == (12, 12)


# Stopped, damaged, foreign


def test_a_stopped_run_goes_on(lvlm: tuple[Any, Any], whole: Path, copy: Path) -> None:
    (copy / INDEX).unlink()
    (copy / shard_name(3)).unlink()
    (copy / shard_name(8)).unlink()
    (copy / ".lvlm-fastxai-01234567.part").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    with pytest.raises(ArgumentError, match=r"2 of its 12 files of maps are missing.*fastrm build-maps 'scenes:held"):
        open_maps(copy)
    steps: list[tuple[int, int]] = []
    built = build_maps(*lvlm, open_source(SPEC), copy, **SIZES, progress=lambda *step: steps.append(step))
    assert (built.samples, built.shards, built.found, built.damaged) == (24, SHARDS, 20, [])
    assert steps[0] == (20, 24) and steps[-1] == (24, 24) and steps == sorted(steps)
    assert contents(copy) == contents(whole)
    assert {name: (copy / name).stat().st_mtime_ns for name in kept if not name.endswith(".part")} == {
        name: stamp for name, stamp in kept.items() if not name.endswith(".part")
    }
    assert build_maps(*lvlm, open_source(SPEC), copy, **SIZES).found == 24


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped"])
def test_a_damaged_file_is_computed_again(damage: str, lvlm: tuple[Any, Any], whole: Path, copy: Path) -> None:
    path = copy / shard_name(5)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 4
    path.write_bytes({"flipped": data, "cut": data[:-9], "swapped": (copy / shard_name(4)).read_bytes()}[damage])
    with pytest.raises(DamagedShardError, match=r"maps-00005.*build-maps"):
        open_maps(copy)[10]
    said: list[str] = []
    built = build_maps(*lvlm, open_source(SPEC), copy, **SIZES, say=said.append)
    assert built.damaged == [path.name] and built.found == 22
    assert any("damaged" in line and path.name in line for line in said)
    assert contents(copy) == contents(whole)


@pytest.mark.parametrize(
    ("spec", "options", "what"),
    [
        (SPEC, {"method": "lvlm_interpret"}, "method: chefer"),
        (SPEC, {"row_tolerance": 0.1}, "row tolerance: 0.0"),
        (SPEC, {"answers": "reference"}, "kind of answers"),
        (SPEC, {"shard_size": 3}, "shard size: 2"),
        (SPEC.replace("seed=9", "seed=8"), {}, r"source: scenes:held-out\?count=24&seed=9"),
    ],
)
def test_other_maps_are_not_mixed_in(
    spec: str, options: dict[str, Any], what: str, lvlm: tuple[Any, Any], whole: Path
) -> None:
    before = contents(whole)
    with pytest.raises(ArgumentError, match=f"another {what}.*give another folder") as caught:
        build_maps(*lvlm, open_source(spec), whole, **{**SIZES, **options})
    assert "\n" not in str(caught.value)
    assert contents(whole) == before


def test_another_models_maps_are_not_mixed_in(whole: Path) -> None:
    model, processor = fx.load_tiny_lvlm()
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(ArgumentError, match=r"another model: the shipped LVLM \("):
        build_maps(model, processor, open_source(SPEC), whole, **SIZES)


def test_a_set_that_lacks_files(copy: Path, tmp_path: Path) -> None:
    (copy / shard_name(0)).unlink()
    with pytest.raises(ArgumentError, match="1 of the 12 files"):
        open_maps(copy)
    (copy / INDEX).write_text("[]")
    with pytest.raises(ArgumentError, match="is no index of maps"):
        open_maps(copy)
    with pytest.raises(ArgumentError, match="holds no maps"):
        open_maps(tmp_path / "nowhere")


def test_an_unreadable_picture_stops_the_run_and_is_named(lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    lines = [{"image": name, "question": "describe the image."} for name in (str(SAMPLE_IMAGE), "gone.png")]
    source = open_source(str(write_lines(tmp_path / "data.jsonl", *lines)))
    with pytest.raises(ArgumentError, match="line 2: image: there is no file"):
        build_maps(*lvlm, source, tmp_path / "maps", shard_size=1)
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [shard_name(0)]
    shutil.copy(SAMPLE_IMAGE, tmp_path / "gone.png")
    assert build_maps(*lvlm, source, tmp_path / "maps", shard_size=1).found == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "glimpse"}, "method: expected one of chefer, lvlm_interpret"),
        ({"answers": "mine"}, "answers: expected one of"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"row_tolerance": 1.0}, "row_tolerance: expected"),
    ],
)
def test_bad_arguments(options: dict[str, Any], reason: str, lvlm: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=reason):
        build_maps(*lvlm, open_source(SPEC), tmp_path / "maps", **options)
    assert not (tmp_path / "maps").exists()


def test_two_runs_do_not_write_one_folder(lvlm: tuple[Any, Any], whole: Path, copy: Path, tmp_path: Path) -> None:
    """Of other settings or of the same: the second is told of the first, and nothing is mixed or touched."""
    (copy / shard_name(3)).unlink()
    (copy / INDEX).unlink()
    refused: list[str] = []

    def second(done: int, total: int) -> None:
        for options in ({"method": "lvlm_interpret"}, {}):
            with pytest.raises(ArgumentError, match=r"--out: .* is in use by process") as caught:
                build_maps(*lvlm, open_source(SPEC), copy, **{**SIZES, **options})
            refused.append(str(caught.value))

    build_maps(*lvlm, open_source(SPEC), copy, **SIZES, progress=second)
    assert refused and not any("\n" in message for message in refused)
    assert contents(copy) == contents(whole)
    assert build_maps(*lvlm, open_source(SPEC), copy, **SIZES).found == 24  # the lock ends with its run


def test_a_shard_of_other_maps_is_found_when_a_set_is_finished_and_opened(
    lvlm: tuple[Any, Any], copy: Path, tmp_path: Path
) -> None:
    build_maps(*lvlm, open_source(SPEC), tmp_path / "other", **SIZES, method="lvlm_interpret")
    settings = open_maps(copy).settings
    shutil.copy(tmp_path / "other" / shard_name(7), copy)
    with pytest.raises(DamagedShardError, match=r"maps-00007.*another method") as caught:
        write_index(copy, settings)
    assert "\n" not in str(caught.value)
    index = json.loads((copy / INDEX).read_text())
    index["shards"][7]["sha256"] = hashlib.sha256((copy / shard_name(7)).read_bytes()).hexdigest()
    (copy / INDEX).write_text(json.dumps(index))  # as a run without a lock would have listed it
    with pytest.raises(DamagedShardError, match=r"maps-00007.*another method"):
        open_maps(copy)


def test_a_full_disk_is_told_in_one_line(lvlm: tuple[Any, Any], copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / shard_name(3)).unlink()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArgumentError, match=r"--out: cannot write .*disk full"):
        build_maps(*lvlm, open_source(SPEC), copy, **SIZES)


# The command, on one process and on two


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    build_command.add_build_arguments(parser)
    return parser.parse_args(words)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scenes:train?count=3&kinds=color", "--out", str(tmp_path / "maps"), "--json"]
    assert build_command.run_build(parse(*words)) == 0
    out, err = capsys.readouterr()
    found = Built(**json.loads(out))
    assert (found.samples, found.shards, found.found) == (3, 1, 0)
    assert "3/3" in err and "sample" in err
    assert build_command.run_build(parse(*words[:-1])) == 0
    assert capsys.readouterr().out.startswith("3 samples in 1 files: ")
    with pytest.raises(ArgumentError, match="--out"):
        build_command.run_build(parse(words[0], "--out", str(tmp_path / "maps" / INDEX)))
    with pytest.raises(SystemExit):
        parse(*words, "--method", "glimpse")


def two_processes(folder: Path) -> subprocess.Popen[str]:
    script = folder.parent / "command.py"
    script.write_text(
        "import argparse, sys\n"
        "from lvlm_fastxai.fastrm import build_command\n"
        "parser = argparse.ArgumentParser()\n"
        "build_command.add_build_arguments(parser)\n"
        "sys.exit(build_command.run_build(parser.parse_args()))\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    return subprocess.Popen(
        [sys.executable, *launch, str(script), SPEC, "--out", str(folder), "--json", *sizes],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
@pytest.mark.timeout(600)
def test_two_processes_one_of_them_killed_write_what_one_writes(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    launcher = two_processes(folder)
    while launcher.poll() is None and len(list(folder.glob("maps-*.safetensors"))) < 2:
        time.sleep(0.01)
    workers = children(launcher.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, err = launcher.communicate(timeout=240)
    assert launcher.returncode != 0, err
    wanted = contents(whole)
    stopped = {name: data for name, data in contents(folder).items() if not name.startswith(".lvlm-fastxai")}
    assert 2 <= len(stopped) < SHARDS
    assert stopped == {name: wanted[name] for name in stopped}  # no index, and nothing half

    launcher = two_processes(folder)
    out, err = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, err
    assert json.loads(out)["found"] == 2 * len(stopped)
    assert contents(folder) == wanted
