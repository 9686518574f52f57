"""Ctrl-C at any moment, also twice, leaves the model as it was.

Python looks for an interrupt where a function begins and where a built-in one returns. A profile function sees exactly
these moments, so an interrupt can be put at any of them by its number, which makes a run repeatable.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.models import answer_targets, build
from support.state import fingerprint, put_to_use
from torch import nn

import lvlm_fastxai as fx
from lvlm_fastxai.models.guard import Undo, shielded
from lvlm_fastxai.models.lock import holding
from lvlm_fastxai.prompting.answers import Evaluating
from lvlm_fastxai.sweep.recording import Recorder
from lvlm_fastxai.sweep.tape import current_tape

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[[], object]


class Press:
    """Presses Ctrl-C at a numbered moment, counted from when it is armed."""

    # Put down by an assignment alone: a call would be one more moment.
    armed = False

    def __init__(self, moment: int) -> None:
        self.moments = 0
        self._moment = moment

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_return"):
            self._count()

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        self._count()  # of the beginnings of functions only: it never asks for the lines

    def _count(self) -> None:
        self.moments += Press.armed
        if Press.armed and self.moments == self._moment:
            signal.raise_signal(signal.SIGINT)


class Hand:
    """The handler of SIGINT below ours: raises KeyboardInterrupt, and can have the next one pressed thereafter."""

    def __init__(self) -> None:
        self.raised = 0
        self.then: Press | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.raised += 1
        if self.then is not None:
            sys.setprofile(self.then.profile)
            self.then = None
        raise KeyboardInterrupt


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hand]:
    # An interrupt in a destructor is reported to this hook, and pytest's own could be interrupted in turn.
    monkeypatch.setattr(sys, "unraisablehook", lambda report: None)
    before, hand = signal.getsignal(signal.SIGINT), Hand()
    signal.signal(signal.SIGINT, hand)
    yield hand
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, dict[str, Any]]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, inputs = build("llama", torch.float32, layers=2, text=4)
    put_to_use(model)
    return model, inputs


def runs(model: nn.Module, inputs: dict[str, Any]) -> list[Run]:
    targets = answer_targets(inputs, 0, 2)

    def explain(**arguments: Any) -> Run:
        return lambda: fx.relevancy_rows(model, inputs, targets, **arguments)

    def record() -> None:
        with Recorder(model), torch.no_grad():
            model(**inputs)

    def ask() -> None:
        with Evaluating(model), torch.no_grad():
            model(**inputs)

    return [
        explain(),
        explain(memory="lean", row_tolerance=0.3),
        explain(memory="min"),
        explain(method="glimpse"),
        record,
        ask,
    ]


def state(model: nn.Module, folder: str) -> dict[str, Any]:
    """Everything that a run could leave behind."""
    found = fingerprint(model)
    del found["config"]  # slow to write out; its attention is looked at by name
    return {
        **found,
        "gradient mode": torch.is_grad_enabled(),
        "tape": current_tape.get(),
        "handler": signal.getsignal(signal.SIGINT),
        "held": holding(model)._is_owned(),  # type: ignore[attr-defined]
        "files": os.listdir(folder),
        "grad": None,
    }


def press(run: Run, first: Press, *, by_trace: bool = False) -> None:
    """Run until Ctrl-C ends it, if it does."""
    (sys.settrace if by_trace else sys.setprofile)(first.trace if by_trace else first.profile)
    Press.armed = True
    try:
        run()
        Press.armed = False
    except KeyboardInterrupt:
        Press.armed = False
    sys.settrace(None)
    sys.setprofile(None)


def length(run: Run, *, by_trace: bool = False) -> int:
    """How many moments a run has."""
    run()
    never = Press(-1)
    press(run, never, by_trace=by_trace)
    return never.moments


def test_an_interrupt_at_a_random_moment(pair: tuple[nn.Module, dict[str, Any]], hand: Hand) -> None:
    model, inputs = pair
    before, draw = state(model, tempfile.gettempdir()), random.Random(0)
    for run in runs(model, inputs):
        moments = length(run)
        for moment in (draw.randint(1, moments - 50) for _ in range(60)):
            hand.raised = 0
            press(run, Press(moment))
            assert hand.raised == 1, f"moment {moment} of {moments}: the interrupt was forgotten"
            assert state(model, tempfile.gettempdir()) == before, f"moment {moment} of {moments}"


def test_two_interrupts_at_random_moments(pair: tuple[nn.Module, dict[str, Any]], hand: Hand) -> None:
    """The second comes while the first unwinds the stack and the model is restored."""
    model, inputs = pair
    before, draw, doubles = state(model, tempfile.gettempdir()), random.Random(1), 0
    for run in runs(model, inputs):
        moments = length(run, by_trace=True)
        for moment in (draw.randint(1, moments - 20) for _ in range(60)):
            hand.raised, hand.then = 0, Press(later := draw.randint(1, 300))
            press(run, Press(moment), by_trace=True)
            doubles += hand.raised == 2
            assert state(model, tempfile.gettempdir()) == before, f"moment {moment} of {moments} and {later} later"
    assert doubles > 200


def test_an_interrupt_at_every_moment_of_entering_and_leaving(
    pair: tuple[nn.Module, dict[str, Any]], hand: Hand
) -> None:
    model, _ = pair
    before = state(model, tempfile.gettempdir())

    def enter() -> None:
        with Recorder(model):
            pass

    moments = length(enter)
    assert moments > 300
    for moment in range(1, moments - 3):
        hand.raised = 0
        press(enter, Press(moment))
        assert hand.raised == 1
        assert state(model, tempfile.gettempdir()) == before, f"moment {moment} of {moments}"


def test_real_signals(pair: tuple[nn.Module, dict[str, Any]], hand: Hand) -> None:
    """Sent from another thread whenever the clock says so."""
    model, inputs = pair
    before, draw = state(model, tempfile.gettempdir()), random.Random(2)
    for run in runs(model, inputs):
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        for _ in range(5):

            def send(delay: float = draw.uniform(0, seconds)) -> None:
                time.sleep(delay)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

            sender = threading.Thread(target=send)
            with contextlib.suppress(KeyboardInterrupt):
                sender.start()
                while sender.is_alive():
                    run()
            sender.join()
            assert state(model, tempfile.gettempdir()) == before


def test_an_interrupt_waits_for_what_is_shielded(pair: tuple[nn.Module, dict[str, Any]], hand: Hand) -> None:
    model, _ = pair
    done = []

    @shielded
    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("work")

    with pytest.raises(KeyboardInterrupt), Recorder(model):
        work()
    assert done == ["work"] and hand.raised == 1
    # Without a guard there is nothing to protect, and the interrupt is the caller's at once.
    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["work"] and hand.raised == 2


def test_an_undo_that_fails_does_not_stop_the_others() -> None:
    undone: list[int] = []
    undo = Undo()
    undo.on_close(undone.append, 1)
    undo.on_close(lambda: 1 / 0)
    undo.on_close(undone.append, 2)
    with pytest.raises(ZeroDivisionError):
        undo.close()
    assert undone == [2, 1]
    undo.close()


def test_a_handler_that_was_set_meanwhile_stays(pair: tuple[nn.Module, dict[str, Any]], hand: Hand) -> None:
    model, _ = pair
    with Recorder(model):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
