"""The command line: what it writes, what it says, how it fails."""

from __future__ import annotations

import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.models import build

import lvlm_fastxai.models.checkpoint
from lvlm_fastxai import cli
from lvlm_fastxai.explain import explainer
from lvlm_fastxai.fastrm import FastRM
from lvlm_fastxai.review import Policy, Queue
from lvlm_fastxai.tiny.model import build_model, build_processor, save_checkpoint

QUESTION = "what color is the circle?"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(build_model(0), folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


def expect_one_line(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    found, out, err = result
    assert found == code and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("lvlm-fastxai: "), err
    assert message in err


def test_explain_writes_report_json_and_pictures(run, checkpoint, picture, tmp_path):
    out = tmp_path / "a report"
    code, text, err = run(
        "explain", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", 3, "--memory", "lean", "--out", out
    )
    assert (code, err) == (0, "")
    stored = json.loads((out / "explanation.json").read_text(encoding="utf-8"))
    assert text.splitlines()[0] == stored["answer"] and str(out / "report.html") in text
    assert stored["memory"] == "lean" and len(stored["tokens"]) == 3
    assert np.array(stored["image_maps"][0]).shape == (12, 12)
    assert (out / "answer.png").exists() and len(list((out / "tokens").iterdir())) == 3
    command = stored["command"]
    assert command.startswith("lvlm-fastxai explain ") and "--memory lean" in command and "--method" not in command
    assert command in (out / "report.html").read_text(encoding="utf-8").replace("&#x27;", "'")
    assert stored["model"]["name"] == checkpoint.name


def test_options_of_glimpse_reach_the_method_and_the_command(run, checkpoint, picture, tmp_path):
    code, text, err = run(
        "explain", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", 4, "--out", tmp_path,
        "--method", "glimpse", "--propagation", "identity", "--stats-domain", "causal", "--depth-rate", "scaled",
        "--head-temperature", 0.7, "--layers", "top:0.5", "--tokens", "top:2",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "2 of 4 tokens explained" in text
    stored = json.loads((tmp_path / "explanation.json").read_text(encoding="utf-8"))
    assert stored["options"] == {
        "propagation": "identity",
        "stats_domain": "causal",
        "head_temperature": 0.7,
        "depth_rate": "scaled",
        "layers": "top:0.5",
        "route": "one_sweep",
    }
    assert len(stored["tokens"]) == len(stored["untouched"]) == 2
    for option in ("--layers top:0.5", "--depth-rate scaled", "--tokens top:2", "--head-temperature 0.7"):
        assert option in stored["command"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "top:0.5"], "an option of --method glimpse, not of chefer"),
        (["--method", "glimpse", "--layers", "half"], "layers: expected"),
        (["--method", "glimpse", "--depth-rate", "steep"], "expected 'scaled' or a number"),
        (["--method", "glimpse", "--head-temperature", "0"], "head_temperature: expected"),
        (["--tokens", "most"], "tokens: expected"),
    ],
)
def test_wrong_options_are_told_before_a_model_is_loaded(run, picture, tmp_path, options, message):
    expect_one_line(run("explain", picture, QUESTION, "--model", tmp_path / "none", *options), message)


def test_explain_under_a_policy(run, picture, tmp_path, checkpoint):
    head = FastRM.from_pretrained("shipped")
    fixed = {"features": ("probability",), "mean": (0.0,), "scale": (1.0,), "coefficients": (0.0,), "target": 0.9}
    policies = {}
    for name, intercept, fingerprint in (("accept", 9.0, head.fingerprint), ("review", 0.0, head.fingerprint)):
        policies[name] = tmp_path / f"{name}.json"
        Policy(
            **fixed,
            intercept=intercept,
            threshold=0.9,
            delta=0.05,
            model_fingerprint=head.config.model_fingerprint,
            head_fingerprint=fingerprint,
        ).save(policies[name])
    queue = tmp_path / "queue.db"
    options = ("--max-new-tokens", 2, "--queue", queue, "--out", tmp_path / "out")
    for name, method in (("accept", "fastrm"), ("review", "chefer"), ("review", "chefer")):
        code, text, err = run("explain", picture, QUESTION, "--method", method, "--policy", policies[name], *options)
        assert (code, err) == (0, "")
        stored = json.loads((tmp_path / "out" / "explanation.json").read_text(encoding="utf-8"))
        assert stored["decision"]["verdict"] == name and stored["method"] == method and 0 <= stored["entropy"] <= 1
        assert f"--policy {policies[name]} --queue {queue}" in stored["command"]
        assert name in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"review (item 1 of {queue})" in text
    with Queue(queue) as opened:
        (item,) = opened.items()  # the same answer twice is one item
        assert (
            item.question == QUESTION
            and item.answer == stored["answer"]
            and item.features["entropy"] == stored["entropy"]
        )
        assert np.allclose(opened.image_map(item.id), stored["image_maps"][0], rtol=1e-5)
    # A name that is not UTF-8 is spelled out in the queue.
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    shutil.copyfile(picture, odd)
    code, text, err = run("explain", odd, "how many?", "--policy", policies["review"], *options)
    assert (code, err) == (0, "") and "review (item 2 of" in text
    with Queue(queue) as opened:
        assert [Path(item.sample_id).name for item in opened.items()] == ["picture.png", "caf\\xe9.png"]
    # Of another model: refused before it answers.
    other = ("--model", checkpoint, "--head", "shipped")
    expect_one_line(
        run("explain", picture, QUESTION, "--policy", policies["accept"], *options, *other), "trained for the shipped"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queue", "queue.db"], "give --policy"),
        (["--policy", "p.json", "--tokens", "content"], "leave --tokens out"),
        (["--policy", "nowhere.json"], "nowhere.json"),
        (["--method", "fastrm", "--model", "."], "give --head"),
        (["--policy", "p.json", "--model", "."], "give --head"),
        (["--head", "nowhere"], "holds no FastRM head"),
    ],
)
def test_wrong_options_of_a_decision(run, picture, options, message):
    expect_one_line(run("explain", picture, QUESTION, *options), message)


def test_explain_as_json(run, checkpoint, picture, tmp_path):
    code, text, err = run(
        "explain", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", 1, "--out", tmp_path, "--json",
        "--method", "raw_attention",
    )  # fmt: skip
    assert (code, err) == (0, "")
    printed = json.loads(text)
    assert printed["method"] == "raw_attention" and Path(printed["files"]["report"]).exists()


def test_reference_backend_agrees(run, checkpoint, picture, tmp_path):
    maps = []
    for backend in ([], ["--backend", "reference"]):
        arguments = ("--model", checkpoint, "--max-new-tokens", 1, "--out", tmp_path, "--json")
        code, text, _ = run("explain", picture, QUESTION, *arguments, *backend)
        assert code == 0
        maps.append(np.array(json.loads(text)["image_maps"][0]))
    assert json.loads(text)["backend"] == "reference"
    np.testing.assert_allclose(*maps, rtol=1e-3, atol=1e-7)


def test_estimate(run, checkpoint, picture):
    code, text, _ = run("estimate", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", 4)
    assert code == 0 and "MiB" in text
    code, text, _ = run("estimate", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", 4, "--json")
    assert code == 0 and json.loads(text)["seconds"] > 0


def test_info(run):
    code, text, _ = run("info", "--json")
    assert code == 0 and "relevancy_product" in json.loads(text)["operators"]
    code, text, _ = run("info")
    assert code == 0 and "reference" in text


@pytest.mark.parametrize("command", ["explain", "estimate", "info", "evaluate", "fastrm", "calibrate", "review"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert "example: lvlm-fastxai" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["explain", "estimate"])
def test_the_example_can_be_pasted(run, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = (known.example for known in cli.COMMANDS if known.name == command)
    program, *arguments = shlex.split(example)
    code, text, err = run(*arguments)
    assert (program, code, err) == ("lvlm-fastxai", 0, "") and text
    assert (tmp_path / "report" / "report.html").is_file() == (command == "explain")


HELP = """
import resource, sys
from lvlm_fastxai.cli import main
try: main([*sys.argv[1:], "--help"])
except SystemExit: pass
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, *{"torch", "transformers", "numpy"} & set(sys.modules), file=sys.stderr)
"""
NESTED = [
    *(("fastrm", name) for name in ("build-maps", "train", "evaluate")),
    *(("review", name) for name in ("run", "serve", "list", "export", "backup")),
]


@pytest.mark.parametrize("command", [(), *((command.name,) for command in cli.COMMANDS), *NESTED], ids=" ".join)
def test_help_is_quick(command):
    best = math.inf
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", HELP, *command], capture_output=True, text=True, check=True)
        seconds, *loaded = run.stderr.split()
        assert loaded == [] and "usage: lvlm-fastxai" in run.stdout
        best = min(best, float(seconds))
        if best < 0.3:
            break
    assert best < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--help"),
        (["explode"], "--help"),
        (["explain"], "IMAGE, QUESTION"),
        (["explain", "{picture}", QUESTION, "--method", "lime"], "--method"),
        (["explain", "{picture}", QUESTION, "--max-new-tokens", "many"], "--max-new-tokens"),
        (["explain", "{picture}", QUESTION, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["explain", "{picture}", ""], "empty question"),
        (["explain", "{picture}", "  "], "empty question"),
        (["explain", "absent.png", QUESTION], "no file 'absent.png'"),
        (["explain", __file__, QUESTION], "as a picture"),
        (["explain", "{folder}", QUESTION], "Is a directory"),
        (["estimate", "absent.png", QUESTION], "no file 'absent.png'"),
        (["explain", "{picture}", QUESTION, "--model", "{folder}"], "config.json"),
        (["explain", "{picture}", QUESTION, "--model", "{checkpoint}", "--device", "abacus"], "--device"),
        (["explain", "{picture}", QUESTION, "--device", "meta"], "'meta' computes nothing"),
        (["explain", "absent\udcff.png", QUESTION], "absent\\xff.png"),
        (["explain", "{picture}", "what is <image>?", "--model", "{checkpoint}"], "image marker"),
    ],
)
def test_bad_input(run, checkpoint, picture, tmp_path, arguments, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    if len(arguments) > 2 and arguments[0] == "explain":
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    filled = [a.format(picture=picture, folder=folder, checkpoint=checkpoint) for a in arguments]
    expect_one_line(run(*filled), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cuda backend may be present")
@pytest.mark.parametrize("command", ["explain", "estimate"])
def test_absent_backend(run, checkpoint, picture, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_one_line(run(command, picture, QUESTION, "--model", checkpoint, "--backend", "cuda"), "--backend")


@pytest.mark.parametrize("below", ["", "sub"])
def test_output_folder_is_tried_before_anything_is_computed(run, checkpoint, picture, tmp_path, monkeypatch, below):
    monkeypatch.setattr(
        lvlm_fastxai.models.checkpoint, "load_checkpoint", lambda *unused: pytest.fail("the model was loaded")
    )
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / below
    expect_one_line(run("explain", picture, QUESTION, "--model", checkpoint, "--out", out), "output folder")
    assert (tmp_path / "file").read_text() == ""


def test_text_only_model(run, picture, tmp_path):
    model, _ = build("llama", torch.float32)
    model.save_pretrained(tmp_path / "llama")
    build_processor().tokenizer.save_pretrained(tmp_path / "llama")
    result = run("explain", picture, QUESTION, "--model", tmp_path / "llama", "--out", tmp_path / "out")
    expect_one_line(result, "reads no images")


def test_chat_template_without_the_image(run, picture, tmp_path):
    save_checkpoint(build_model(0), tmp_path)
    processor = build_processor()
    processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    processor.save_pretrained(tmp_path)
    expect_one_line(run("explain", picture, QUESTION, "--model", tmp_path, "--out", tmp_path / "out"), "image")


def test_logits_that_are_not_numbers(run, picture, tmp_path):
    model = build_model(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    save_checkpoint(model, tmp_path)
    expect_one_line(run("explain", picture, QUESTION, "--model", tmp_path, "--out", tmp_path / "out"), "NaN")


def test_damaged_checkpoint(run, picture, tmp_path):
    save_checkpoint(build_model(0), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    expect_one_line(run("explain", picture, QUESTION, "--model", tmp_path, "--out", tmp_path / "out"), "cannot load")


def test_attention_that_cannot_be_registered(run, checkpoint, picture, tmp_path, monkeypatch):
    def own_attention(self: Any, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(self.q_proj(hidden_states)), None

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", own_attention)
    result = run("explain", picture, QUESTION, "--model", checkpoint, "--out", tmp_path, "--max-new-tokens", 1)
    expect_one_line(result, "attention")


def test_interrupted(run, checkpoint, picture, tmp_path, monkeypatch):
    def interrupt(*unused: Any, **also_unused: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(explainer, "explain_rows", interrupt)
    out = tmp_path / "out"
    result = run("explain", picture, QUESTION, "--model", checkpoint, "--out", out, "--max-new-tokens", 1)
    expect_one_line(result, "interrupted", code=130)
    assert list(out.iterdir()) == []


def test_progress_bar_on_a_terminal(run, checkpoint, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = run("explain", picture, QUESTION, "--model", checkpoint, "--out", tmp_path, "--max-new-tokens", 2)
    assert code == 0 and "generate" in err and "explain" in err


COMMAND = [sys.executable, "-m", "lvlm_fastxai.cli"]
# Output is lost when a buffer is flushed, which an inherited setting would avoid.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("arguments", [["info", "--json"], ["--help"]], ids=" ".join)
def test_closed_pipe_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        result = subprocess.run(
            [*COMMAND, *arguments], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED
        )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device whose disk is full")
@pytest.mark.parametrize("arguments", [["info"], ["--help"]], ids=" ".join)
def test_output_on_a_full_disk(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED
        )
    expect_one_line((result.returncode, "", result.stderr), "No space left on device")


@pytest.mark.parametrize("stream", [1, 2])
def test_standard_streams_may_be_closed(checkpoint, picture, tmp_path, stream):
    out = tmp_path / "out"
    arguments = ["explain", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", "1", "--out", out]
    shell = shlex.join(map(str, [*COMMAND, *arguments])) + f" {stream}>&-"
    result = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert (out / "report.html").is_file()


def test_a_report_on_a_full_disk(run, checkpoint, picture, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        out = tmp_path / "out"
        result = run("explain", picture, QUESTION, "--model", checkpoint, "--out", out, "--max-new-tokens", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    expect_one_line(result, "cannot write")
    assert list(out.iterdir()) == []


def test_an_answer_keeps_its_lines(run, checkpoint, picture, tmp_path, monkeypatch):
    original = explainer.Explainer.__call__

    def of_two_lines(self: Any, *args: Any, **options: Any) -> Any:
        explanation = original(self, *args, **options)
        explanation.answer = "one\n\x1b[31mtwo"
        return explanation

    monkeypatch.setattr(explainer.Explainer, "__call__", of_two_lines)
    code, text, _ = run("explain", picture, QUESTION, "--model", checkpoint, "--out", tmp_path, "--max-new-tokens", 1)
    assert code == 0 and text.startswith("one\n\\x1b[31mtwo\n")
