"""What resumable runs share: checkpoints that are whole or not there, generators that go on, schedules, stops."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.training.checkpoints import Checkpoint, Generator
from lvlm_fastxai.training.metrics import MetricsLog, Smoothed
from lvlm_fastxai.training.schedule import Average, warm_up_then_cosine, warm_up_then_fall
from lvlm_fastxai.training.stopping import Stop


class Run:
    """A run whose steps depend on everything that a checkpoint has to keep."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.average = Average(self.model)
        self.numbers = np.random.default_rng(3)
        self.tensors = torch.Generator().manual_seed(4)
        self.checkpoint = Checkpoint(
            path,
            {
                "model": self.model,
                "optimizer": self.optimizer,
                "average": self.average,
                "numbers": Generator(self.numbers),
                "tensors": Generator(self.tensors),
            },
        )

    def steps(self, count: int) -> None:
        for _ in range(count):
            noise = torch.randn(5, 4, generator=self.tensors) * float(self.numbers.normal())
            self.optimizer.zero_grad()
            self.model(noise).square().mean().backward()
            self.optimizer.step()
            self.average.update(self.model)

    def weights(self) -> bytes:
        states = (self.model.state_dict(), self.average.weights)
        return b"".join(value.numpy().tobytes() for state in states for value in state.values())


def test_a_resumed_run_makes_the_steps_that_an_unbroken_one_makes(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole.pt")
    whole.steps(9)
    first = Run(tmp_path / "state.pt")
    first.steps(4)
    first.checkpoint.save({"step": 4, "history": [(1, 0.5)]})
    first.steps(2)  # lost with the process
    second = Run(tmp_path / "state.pt")
    assert second.checkpoint.load() == {"step": 4, "history": [(1, 0.5)]}
    second.steps(5)
    assert second.weights() == whole.weights()
    assert Run(tmp_path / "none.pt").checkpoint.load() is None


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "state.pt")
    run.checkpoint.save({"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArgumentError, match=r"state: cannot write .*disk full"):
        run.checkpoint.save({"step": 2})
    monkeypatch.undo()
    assert run.checkpoint.load() == {"step": 1}


@pytest.mark.parametrize("damage", ["cut", "other parts", "code"])
def test_a_state_that_is_not_this_runs_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run = Run(path)
    run.checkpoint.save({"step": 1})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "other parts":
        Checkpoint(path, {"model": nn.Linear(3, 1)}).save({"step": 1})
    else:
        torch.save({"parts": {"model": Path("anything")}, "values": {}}, path)  # what it would run when read
    with pytest.raises(ArgumentError, match=r"cannot go on from .*state\.pt.*remove it to begin anew") as caught:
        run.checkpoint.load()
    assert "\n" not in str(caught.value)


def test_rates_rise_and_fall() -> None:
    fall = [warm_up_then_fall(step, 1000, 0.35) for step in range(1000)]
    assert fall[:2] == [0.01, 0.02] and max(fall) == fall[99] == fall[650] == 1.0 and fall[-1] < 0.003
    cosine = [warm_up_then_cosine(step, 100) for step in range(100)]
    assert cosine[0] == 0.1 and max(cosine) == cosine[9] == cosine[10] == 1.0 and cosine[-1] < 1e-3
    assert cosine[10:] == sorted(cosine[10:], reverse=True)


def test_an_average_follows_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    before = float(average.weights["weight"])
    average.update(model)
    # The first update keeps 1 / 11 of what it began with, however slow the decay is.
    assert float(average.weights["weight"]) == pytest.approx(before / 11 + 10 / 11)
    for _ in range(60):
        average.update(model)
    assert float(average.weights["weight"]) == pytest.approx(1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_the_handler_is_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(RuntimeError), Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        raise RuntimeError
    assert signal.getsignal(number) == before


def test_figures_are_smoothed_and_logged_by_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = Smoothed(0.9)
    figures.add({"loss": 1.0})
    figures.add({"loss": 2.0, "hit": 0.5})
    assert figures.line() == "loss 1.100 hit 0.500"
    for shown in (False, True):
        with MetricsLog(tmp_path / str(shown), shown=shown, extra="fastrm") as log:
            log.write(1, {"loss": 0.25})
    assert capsys.readouterr().err.count("epoch 1: loss 0.2500") == 1
    assert not (tmp_path / "False").exists()
