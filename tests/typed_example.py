"""A program that uses the public API, for ``mypy --strict``: what it gets has the type that is documented."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import lvlm_fastxai as fx
from lvlm_fastxai import review, tiny
from lvlm_fastxai.choices import BackendName
from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.fastrm import LiveStep, Prediction, stream


def asked(processor: Any) -> dict[str, Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": tiny.SAMPLE_QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=Image.open(tiny.SAMPLE_IMAGE), text=text, return_tensors="pt"))


def rows() -> None:
    model, processor = fx.load_tiny_lvlm()
    inputs = asked(processor)
    column = inputs["input_ids"].shape[1] - 2
    targets = [(0, column, 5), (0, column - 1, 5)]
    assert_type(fx.relevancy_rows(model, inputs, targets, method="chefer", memory="lean"), Tensor)
    options = fx.GlimpseOptions(layers="top:0.6", propagation="identity")
    found = fx.explain_rows(model, inputs, torch.tensor(targets), method="glimpse", options=options, compare=True)
    assert_type(found, fx.RelevancyRows)
    assert_type(found.probabilities, Tensor)
    whole = fx.aggregate(found.rows, found.probabilities, [1, 2], [column], weighting="confidence")
    assert_type(whole, fx.Aggregate)
    aggregator = fx.Aggregator([1, 2], [column], "uniform")
    aggregator.add(found.rows, found.probabilities)
    assert_type(aggregator.result().image_map, Tensor)


def explanation() -> None:
    explainer = fx.Explainer(*fx.load_tiny_lvlm(), row_tolerance="auto")
    seen: list[tuple[str, int, int]] = []
    found = explainer(
        tiny.SAMPLE_IMAGE,
        tiny.SAMPLE_QUESTION,
        max_new_tokens=2,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert_type(found, fx.Explanation)
    assert_type(found.tokens[0].image_map, NDArray[np.float32])
    assert_type(found.tokens[0].probability, float)
    assert_type(explainer.estimate(tiny.SAMPLE_IMAGE, tiny.SAMPLE_QUESTION).seconds, float)
    with tempfile.TemporaryDirectory() as folder:
        assert_type(found.save(folder)["report"], Path)


def live() -> None:
    model, processor = fx.load_tiny_lvlm()
    inputs = asked(processor)
    head = fx.FastRM.from_pretrained("shipped")
    assert_type(head, fx.FastRM)
    assert_type(head.predict(torch.randn(1, 3, 192), torch.randn(1, 1, 192)), Prediction)
    with fx.LiveMaps(head, model, inputs) as maps:
        model.generate(**inputs, streamer=maps, max_new_tokens=1)  # type: ignore[arg-type, misc]
    assert_type(maps.steps, list[LiveStep])
    for step in stream(head, model, inputs, max_new_tokens=1):
        assert_type(step.token().entropy, float)


def operators() -> None:
    query, logsumexp, row = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 3), torch.ones(1, 1, 3)
    with fx.use_backend("reference"):
        product = fx.ops.relevancy_product(query, query, query, query[:, None], logsumexp, row)
    assert_type(product, Tensor)
    assert_type(fx.ops.backends("relevancy_product"), dict[BackendName, str | None])
    hidden = torch.randn(1, 5, 8)
    fx.ops.proxy_relevancy(hidden, torch.randn(1, 1, 8), torch.zeros(1, 1), norm="layer", backend="cpu")


def reviewing() -> None:
    policy = review.Policy(("probability",), (3.0,), (2.0,), (2.0,), 1.0, threshold=0.9, target=0.95, delta=0.05)
    assert_type(policy.decide({"probability": 0.5}), review.Decision)
    with tempfile.TemporaryDirectory() as folder, review.Queue(Path(folder) / "queue.db") as queue:
        record = review.Record(Image.new("RGB", (8, 8)), "what is it?", "a square", {"probability": 0.5})
        applied = review.apply(policy, queue, record)
        assert_type(applied.item, int | None)
    answers = review.Answers.of({"entropy": [0.2, 0.9, 0.4]}, [True, False, True], ["cat", "cat", "dog"])
    assert_type(answers.pictures, int)


if TYPE_CHECKING:
    # Each of these is a mistake; a type checker that takes one for right calls its comment unused.
    fx.use_backend("gpu")  # type: ignore[arg-type]
    fx.FastRMConfig(hidden_size=8, norm="batch")  # type: ignore[arg-type]
    fx.GlimpseOptions(route="no_sweep")  # type: ignore[arg-type]
    fx.Aggregator([0], [1], "mean")  # type: ignore[arg-type]
    fx.Explainer(*fx.load_tiny_lvlm(), method="gradcam")  # type: ignore[arg-type]
    fx.Explainer(*fx.load_tiny_lvlm(), memory="tiny")  # type: ignore[arg-type]
    fx.Explainer(*fx.load_tiny_lvlm(), row_tolerance="none")  # type: ignore[arg-type]


def main() -> None:
    for part in (rows, explanation, live, operators, reviewing):
        part()
    try:
        fx.FastRMConfig(hidden_size=0)
    except ArgumentError as error:
        assert_type(error, ArgumentError)


if __name__ == "__main__":
    main()
