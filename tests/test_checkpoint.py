"""Checkpoints from folders: none of their code runs unless it is trusted, and what is wrong is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lvlm_fastxai.console import add_model_arguments
from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.models import SHIPPED
from lvlm_fastxai.models.checkpoint import load_checkpoint

CONFIG_CODE = """
import pathlib
from transformers import LlavaConfig
pathlib.Path({mark!r}).touch()
class OwnConfig(LlavaConfig):
    model_type = {model_type!r}
"""
MODEL_CODE = """
from transformers import LlavaForConditionalGeneration
from .own_config import OwnConfig
class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig
"""
PROCESSOR_CODE = """
import pathlib
from transformers import LlavaProcessor
pathlib.Path({mark!r}).touch()
class OwnProcessor(LlavaProcessor):
    pass
"""


def change(path: Path, **values: object) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped checkpoint, its files replaced and not changed by those who write to it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for path in SHIPPED.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def own_model(folder: Path, tmp_path: Path) -> Path:
    """Configuration and model are classes in the folder; reading the first leaves a mark."""
    code = CONFIG_CODE.format(mark=str(tmp_path / "ran"), model_type="own_llava")
    (folder / "own_config.py").write_text(code, encoding="utf-8")
    (folder / "own_model.py").write_text(MODEL_CODE, encoding="utf-8")
    classes = {"AutoConfig": "own_config.OwnConfig", "AutoModelForImageTextToText": "own_model.OwnModel"}
    change(folder / "config.json", model_type="own_llava", auto_map=classes)
    # Weights that are shared by name are known of transformers' own model types only.
    weights = load_file(folder / "model.safetensors")
    (table,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    save_file({**weights, "lm_head.weight": weights[table].clone()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def own_processor(folder: Path, tmp_path: Path) -> Path:
    (folder / "own_processor.py").write_text(PROCESSOR_CODE.format(mark=str(tmp_path / "ran")), encoding="utf-8")
    name = "processor_config.json"
    if not (folder / name).exists():
        (folder / name).write_text("{}", encoding="utf-8")
    change(folder / name, processor_class="OwnProcessor", auto_map={"AutoProcessor": "own_processor.OwnProcessor"})
    return folder


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(own_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"needs Python code.*config\.json.*--trust-remote-code$") as told:
        load_checkpoint(own_model)
    assert "\n" not in str(told.value) and not (tmp_path / "ran").exists()
    model, _, _ = load_checkpoint(own_model, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel" and (tmp_path / "ran").exists()


def test_code_of_a_processor_runs_only_when_it_is_trusted(own_processor: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"needs Python code of its own, which processor_config\.json names"):
        load_checkpoint(own_processor)
    assert not (tmp_path / "ran").exists()
    _, processor, _ = load_checkpoint(own_processor, trust_remote_code=True)
    assert type(processor).__name__ == "OwnProcessor" and (tmp_path / "ran").exists()


def test_nobody_is_asked_whether_code_may_run(own_model: Path, tmp_path: Path) -> None:
    """transformers asks on stdin, where a pipe may say yes for a user who never saw the question."""
    picture = Path(__file__).parent.parent / "lvlm_fastxai" / "tiny" / "sample.png"
    command = [sys.executable, "-m", "lvlm_fastxai.cli", "explain", str(picture), "what?", "--model", str(own_model)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], input="y\n" * 9, capture_output=True, text=True)
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "ran").exists()


def test_code_that_is_not_needed_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Many checkpoints carry the code of the time before transformers had their model."""
    code = CONFIG_CODE.format(mark=str(tmp_path / "ran"), model_type="llava")
    (folder / "own_config.py").write_text(code, encoding="utf-8")
    change(folder / "config.json", auto_map={"AutoConfig": "own_config.OwnConfig"})
    model, _, _ = load_checkpoint(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not (tmp_path / "ran").exists()


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(ArgumentError, match="--device: 'meta' holds no numbers"):
        load_checkpoint(None, "meta")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"{"),
        ("config.json", b"[" * 100_000),
        ("config.json", b"\xff\xfe"),
        ("model.safetensors", b"damaged"),
        ("tokenizer.json", b"{}"),
    ],
)
def test_damaged_files_are_one_line(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(ArgumentError, match=r"^--model: cannot load '") as caught:
        load_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_a_folder_s_name_need_not_be_text(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"--model: '.*caf\\xe9' is no folder"):
        load_checkpoint(tmp_path / "caf\udce9")


def test_every_command_that_takes_a_model_takes_the_flag() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    assert parser.parse_args([]).trust_remote_code is False
    assert parser.parse_args(["--trust-remote-code"]).trust_remote_code is True
