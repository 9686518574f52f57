"""The maps that are compared: the package's methods, gradient × input, and a random map as the floor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .. import families
from ..relevancy import relevancy_rows
from ..sweep import Sweep
from ..targets import check_targets
from .answering import Answerer, Inputs, batched
from .cases import Case

Box = tuple[float, float, float, float]
Target = tuple[int, int, int]

UNTRAINED_SEED = 2**40


def gradient_input_rows(model: nn.Module, inputs: Mapping[str, Any], targets: Sequence[Target]) -> Tensor:
    """|Σ_d ∂z/∂x_jd · x_jd| at the language model's input embeddings x, per target.

    Args:
        model: a transformers image-text-to-text or causal-LM model; left as it was found.
        inputs: keyword arguments of ``model.forward``, teacher forced.
        targets: (sample, query_row, token_id) triples; z is the raw logit.

    Returns:
        (N, S) fp32.

    Raises:
        ArgumentError, UnsupportedModelError: as `lvlm_fastxai.relevancy_rows`.
    """
    checked = check_targets(targets, dict(inputs), None)
    result = torch.zeros(len(checked), checked.columns)
    with Sweep(model, inputs, checked.row_table()) as sweep:
        for _ in sweep.descend(checked.scalars(sweep.logits)):
            pass
        for slot, gradient in zip(checked.slots, sweep.input_gradients, strict=True):
            scores = (gradient * sweep.first_input).sum(-1).abs().detach().float().cpu()  # (B, S)
            for target in slot:
                result[target] = scores[checked.samples[target]]
    return result


def untrained_twin(model: Any, seed: int) -> Any:
    """A model of the same configuration, device and dtype whose weights are fresh from its initialisation.

    A method that explains what a model has learnt must not do as well on this one (Adebayo et al. 2018). torch's own
    generator is left where it stands.
    """
    with torch.random.fork_rng():
        # Away from the small seeds that people train from: the twin must not be the very model training started with.
        torch.manual_seed(UNTRAINED_SEED + seed)
        twin = type(model)(copy.deepcopy(model.config))
    return twin.to(model.device, model.dtype).eval()


def random_maps(tokens: int, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """(tokens, h, w) uniform noise: what a map that knows nothing scores."""
    return rng.random((tokens, *shape))


def compute_maps(
    answerer: Answerer,
    cases: Sequence[Case],
    answers: Sequence[Sequence[int]],
    methods: Sequence[str],
    *,
    seed: int,
    batch: int = 16,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, list[NDArray[np.float64]]], list[Box]]:
    """Maps of every answer token of every case.

    Args:
        answerer: model and processor.
        cases: n questions.
        answers: their answers' token ids, none empty.
        methods: those of `lvlm_fastxai.relevancy_rows`, "gradient_input", "chefer_untrained" (the same answer explained
            with an untrained twin of the model) and "random".
        seed: of the random maps and the untrained twin.
        batch: questions per pass.
        progress: called with the number of questions just done.

    Returns:
        {method: n arrays (T, h, w)}, and the n boxes of the grids in shares of the picture.
    """
    maps: dict[str, list[Any]] = {method: [None] * len(cases) for method in methods}
    boxes: list[Any] = [None] * len(cases)
    twin = untrained_twin(answerer.model, seed) if "chefer_untrained" in methods else None
    # Answers of one length share a batch, so that no pass carries targets that only one sample has.
    by_length: dict[int, list[int]] = {}
    for index, answer in enumerate(answers):
        by_length.setdefault(len(answer), []).append(index)
    for length, members in sorted(by_length.items()):
        for part in batched(members, batch):
            images = [cases[index].scene.image for index in part]
            prompts = answerer.encode(images, [cases[index].question.text for index in part])
            layouts = image_layouts(answerer, prompts, images)
            start = prompts["input_ids"].shape[1]
            inputs = answerer.accepted(answerer.join(prompts, [answers[index] for index in part]))
            targets = [
                (sample, start + place - 1, token)
                for sample, index in enumerate(part)
                for place, token in enumerate(answers[index])
            ]
            for method in methods:
                if method == "random":
                    for index, layout in zip(part, layouts, strict=True):
                        maps[method][index] = random_maps(length, layout.shape, np.random.default_rng([seed, 3, index]))
                    continue
                if method == "gradient_input":
                    rows = gradient_input_rows(answerer.model, inputs, targets)
                elif method == "chefer_untrained":
                    assert twin is not None
                    rows = relevancy_rows(twin, inputs, targets).cpu()
                else:
                    rows = relevancy_rows(answerer.model, inputs, targets, method=method, prompt_length=start).cpu()
                for own, index, layout in zip(rows.split(length), part, layouts, strict=True):
                    maps[method][index] = np.stack([layout.read(row).double().numpy() for row in own])
            for index, layout in zip(part, layouts, strict=True):
                boxes[index] = layout.box
            progress(len(part))
    return maps, boxes


def image_layouts(answerer: Answerer, prompts: Inputs, images: Sequence[Image.Image]) -> list[families.ImageLayout]:
    """Where the one picture of every prompt of a batch stands in the sequence."""
    return [
        families.image_layouts(
            answerer.model.config,
            prompts,
            sample,
            image_sizes=[(image.height, image.width)],
            image_processor=answerer.processor.image_processor,
        )[0]
        for sample, image in enumerate(images)
    ]
