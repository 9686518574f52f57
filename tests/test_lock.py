"""One model has one lock: callers of the same model take turns, callers of different models do not wait."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.models import answer_targets, build
from support.state import assert_same, fingerprint, put_to_use
from torch import Tensor, nn

import lvlm_fastxai as fx
from lvlm_fastxai.models.lock import holding
from lvlm_fastxai.sweep.tape import current_tape

pytestmark = pytest.mark.usefixtures("one_thread")

# (method, memory, row_tolerance)
REQUESTS = (
    ("chefer", "fast", 0.0),
    ("chefer", "lean", 0.0),
    ("chefer", "min", 0.1),
    ("chefer", "fast", 0.1),
    ("lvlm_interpret", "lean", 0.0),
    ("glimpse", "fast", 0.0),
    ("raw_attention", "fast", 0.0),
)


def ask(model: nn.Module, inputs: dict[str, Any], request: tuple[str, str, float]) -> Tensor:
    method, memory, tolerance = request
    targets = answer_targets(inputs, 0, 2)
    arguments: dict[str, Any] = {"prompt_length": targets[0][1] + 1} if method == "lvlm_interpret" else {}
    return fx.relevancy_rows(model, inputs, targets, method=method, memory=memory, row_tolerance=tolerance, **arguments)


def test_threads_that_share_a_model_get_the_rows_they_would_get_alone() -> None:
    model, inputs = build("llava", torch.float32, layers=2)
    put_to_use(model)
    before = fingerprint(model)
    alone = {request: ask(model, inputs, request) for request in REQUESTS}
    start = threading.Barrier(3)

    def work(number: int) -> list[str]:
        order = random.Random(number).sample(REQUESTS * 3, 3 * len(REQUESTS))
        start.wait()
        return [str(request) for request in order if not torch.equal(ask(model, inputs, request), alone[request])]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [[], [], []]
    assert_same(before, fingerprint(model))
    assert current_tape.get() is None


def test_tasks_of_an_event_loop_share_a_model() -> None:
    model, inputs = build("llava", torch.float32, layers=2)
    before = fingerprint(model)
    alone = [ask(model, inputs, request) for request in REQUESTS]

    async def work() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(ask, model, inputs, request) for request in REQUESTS))

    assert all(map(torch.equal, asyncio.run(work()), alone))
    assert_same(before, fingerprint(model))


def test_a_caller_that_fails_lets_the_next_one_in() -> None:
    model, inputs = build("llava", torch.float32, layers=2)
    expected = ask(model, inputs, REQUESTS[0])
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *call: 1 / 0)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.submit(ask, model, inputs, REQUESTS[0]).result()
        handle.remove()
    with ThreadPoolExecutor(1) as pool:  # another thread, which could not enter a lock that was left held
        assert torch.equal(pool.submit(ask, model, inputs, REQUESTS[0]).result(timeout=60), expected)


def test_two_models_run_at_the_same_time() -> None:
    """Each waits, in the middle of its forward, until the other is there too."""
    meeting = threading.Barrier(2, timeout=60)
    pairs = [build("llava", torch.float32, layers=1, seed=seed) for seed in range(2)]
    alone = [ask(*pair, REQUESTS[0]) for pair in pairs]

    def meet(*call: Any) -> None:
        meeting.wait()

    for model, _ in pairs:
        model.get_output_embeddings().register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: ask(*pair, REQUESTS[0]), pairs))
    assert all(map(torch.equal, found, alone))


def test_views_and_wrappers_of_a_model_share_its_lock() -> None:
    model, _ = build("llava", torch.float32, layers=1)
    other, _ = build("llava", torch.float32, layers=1)
    views = [model, model.model, model.get_decoder(), torch.compile(model), nn.DataParallel(model)]
    assert all(holding(view) is holding(model) for view in views)
    assert holding(other) is not holding(model)
    with holding(model), holding(model):
        pass


def test_a_lock_keeps_no_model_alive() -> None:
    model, _ = build("llava", torch.float32, layers=1)
    alive = weakref.ref(model.get_decoder())
    with holding(model):
        pass
    del model
    gc.collect()
    assert alive() is None
