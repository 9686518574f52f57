"""The maps that are compared: the package's methods and their ablations, gradient × input, and noise as the floor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..choices import Weighting
from ..explain.aggregation import aggregate
from ..explain.relevancy_rows import explain_rows
from ..methods import GlimpseOptions, registry
from ..prompting.answering import Answerer, Inputs, batched
from ..sweep.descent import Descent
from ..sweep.forward import Sweep
from ..sweep.targets import check_targets
from .cases import Case
from .defaults import METHODS

Box = tuple[float, float, float, float]
Target = tuple[int, int, int]

UNTRAINED_SEED = 2**40


@dataclass(frozen=True)
class Variant:
    """How the map of an answer is made.

    Attributes:
        method: one of `lvlm_fastxai.relevancy_rows`, "gradient_input", "chefer_untrained" (the same answer explained
            with an untrained twin of the model) or "random".
        weighting: of the answer's tokens, as for `lvlm_fastxai.aggregate`; "uniform" is the mean of their maps.
        options: of the method.
    """

    method: str
    weighting: Weighting = "uniform"
    options: GlimpseOptions | None = None


_WEIGHED = registry.names(lambda traits: traits.weighs_tokens)
# The method of which parts are left out or exchanged, and what each ablation changes.
ABLATED = "glimpse"
WEIGHTINGS = {
    "glimpse weighting=confidence": Variant(ABLATED, "confidence"),
    "glimpse weighting=prompt": Variant(ABLATED, "prompt"),
    "glimpse weighting=uniform": Variant(ABLATED, "uniform"),
}
ABLATIONS = {
    **WEIGHTINGS,
    "glimpse depth_rate=0": Variant(ABLATED, "glimpse", GlimpseOptions(depth_rate=0.0)),
    "glimpse depth_rate=scaled": Variant(ABLATED, "glimpse", GlimpseOptions(depth_rate="scaled")),
    "glimpse layers=top:0.6": Variant(ABLATED, "glimpse", GlimpseOptions(layers="top:0.6")),
    "glimpse propagation=identity": Variant(ABLATED, "glimpse", GlimpseOptions(propagation="identity")),
    "glimpse stats_domain=causal": Variant(ABLATED, "glimpse", GlimpseOptions(stats_domain="causal")),
    "chefer weighting=glimpse": Variant("chefer", "glimpse"),
}
VARIANTS = {
    **{method: Variant(method, "glimpse" if method in _WEIGHED else "uniform") for method in METHODS},
    **ABLATIONS,
}


@dataclass(frozen=True)
class AnswerMaps:
    """The maps of one answer by one variant.

    Attributes:
        tokens: (T, h, w), one per token.
        weights: (T,) what each token counts for in the map of the answer.
    """

    tokens: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def answer(self) -> NDArray[np.float64]:
        """(h, w), the map of the whole answer."""
        return np.tensordot(self.weights, self.tokens, 1)


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
        descent = Descent(sweep, checked.scalars(sweep.logits))
        for _ in descent:
            pass
        for slot, gradient in zip(checked.slots, descent.input_gradients, strict=True):
            scores = (gradient * descent.first_input).sum(-1).abs().detach().float().cpu()  # (B, S)
            for target in slot:
                result[target] = scores[checked.samples[target]]
    return result


def untrained_twin(model: Any, seed: int) -> Any:
    """Make a model of the same configuration, device and dtype whose weights are fresh from its initialisation.

    A method that explains what a model has learnt must not do as well on this one (Adebayo et al. 2018). torch's own
    generator is left where it stands.
    """
    with torch.random.fork_rng():
        # Away from the small seeds that people train from: the twin must not be the very model training started with.
        torch.manual_seed(UNTRAINED_SEED + seed)
        twin = type(model)(copy.deepcopy(model.config))
    return twin.to(model.device, model.dtype).eval()


def random_maps(tokens: int, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw (tokens, h, w) uniform noise: what a map that knows nothing scores."""
    return rng.random((tokens, *shape))


def compute_maps(
    answerer: Answerer,
    cases: Sequence[Case],
    answers: Sequence[Sequence[int]],
    variants: Sequence[str],
    *,
    seed: int,
    batch: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[dict[str, AnswerMaps]], list[Box]]:
    """Make the maps of every answer, token by token and as a whole.

    Args:
        answerer: model and processor.
        cases: n questions.
        answers: their answers' token ids, none empty.
        variants: names out of ``VARIANTS``. Those that differ in the tokens' weights alone share their rows.
        seed: of the random maps and the untrained twin.
        batch: questions per pass.
        progress: called with the number of questions done so far.

    Returns:
        n dictionaries {variant: maps}, and the n boxes of the grids in shares of the picture.
    """
    maps: list[dict[str, AnswerMaps]] = [{} for _ in cases]
    boxes: list[Any] = [None] * len(cases)
    done = 0
    twin = untrained_twin(answerer.model, seed) if "chefer_untrained" in variants else None
    # Answers of one length share a batch, so that no pass carries targets that only one sample has.
    by_length: dict[int, list[int]] = {}
    for index, answer in enumerate(answers):
        by_length.setdefault(len(answer), []).append(index)
    for _, members in sorted(by_length.items()):
        for part in batched(members, batch):
            joined = _Joined(answerer, [cases[index] for index in part], [answers[index] for index in part], twin)
            for name in variants:
                noise = [np.random.default_rng([seed, 3, index]) for index in part]
                for index, found in zip(part, joined.maps(VARIANTS[name], noise), strict=True):
                    maps[index][name] = found
            for index, layout in zip(part, joined.layouts, strict=True):
                boxes[index] = layout.box
            done += len(part)
            progress(done)
    return maps, boxes


class _Joined:
    """Questions and their answers of one length, in one teacher-forced input."""

    def __init__(
        self, answerer: Answerer, cases: Sequence[Case], answers: Sequence[Sequence[int]], twin: nn.Module | None
    ) -> None:
        images = [case.scene.image for case in cases]
        self._answerer = answerer
        self._answers = answers
        self._questions = [case.question.text for case in cases]
        self._twin = twin
        self._prompts = answerer.encode(images, self._questions)
        self._inputs = answerer.accepted(answerer.join(self._prompts, answers))
        self._start = self._prompts["input_ids"].shape[1]
        self._rows: dict[tuple[str, GlimpseOptions | None], tuple[Tensor, Tensor]] = {}
        self.layouts = [layout for (layout,) in answerer.image_layouts(self._prompts, [[image] for image in images])]

    def maps(self, variant: Variant, noise: Sequence[np.random.Generator]) -> list[AnswerMaps]:
        """Make one variant's maps of every answer; `noise` draws the random ones."""
        length = len(self._answers[0])
        if variant.method == "random":
            made = [random_maps(length, layout.shape, rng) for layout, rng in zip(self.layouts, noise, strict=True)]
            return [AnswerMaps(tokens, self._uniform(sample)) for sample, tokens in enumerate(made)]
        rows, probabilities = (torch.split(values, length) for values in self._of(variant.method, variant.options))
        return [
            AnswerMaps(
                np.stack([layout.read(row).double().numpy() for row in rows[sample]]),
                self._weights(sample, rows[sample], probabilities[sample], variant.weighting),
            )
            for sample, layout in enumerate(self.layouts)
        ]

    def _uniform(self, sample: int) -> NDArray[np.float64]:
        """Weigh special tokens with nothing, all others alike."""
        spoken = self._answerer.spoken(self._answers[sample])
        weights = np.zeros(len(self._answers[sample]))
        weights[spoken] = 1 / len(spoken)
        return weights

    def _weights(self, sample: int, rows: Tensor, probabilities: Tensor, weighting: Weighting) -> NDArray[np.float64]:
        """Weigh the tokens: the map of an answer is linear in its tokens' maps."""
        weights = self._uniform(sample)
        if weighting == "uniform":
            return weights
        spoken = self._answerer.spoken(self._answers[sample])
        found = aggregate(
            rows[spoken],
            probabilities[spoken],
            self._answerer.image_columns(self._prompts, sample),
            self._answerer.question_columns(self._prompts, sample, self._questions[sample]),
            weighting=weighting,
            query_rows=[self._start - 1 + place for place in spoken],
        )
        weights[spoken] = found.image_weights.double().numpy()
        return weights

    def _of(self, method: str, options: GlimpseOptions | None) -> tuple[Tensor, Tensor]:
        """Give the (N, S) rows and (N,) probabilities of all tokens, computed once."""
        key = method, options
        if key not in self._rows:
            targets = [
                (sample, self._start + place - 1, token)
                for sample, answer in enumerate(self._answers)
                for place, token in enumerate(answer)
            ]
            self._rows[key] = _rows(
                self._answerer.model, self._twin, self._inputs, targets, self._start, method, options
            )
        return self._rows[key]


def _rows(
    model: nn.Module,
    twin: nn.Module | None,
    inputs: Inputs,
    targets: Sequence[Target],
    start: int,
    method: str,
    options: GlimpseOptions | None,
) -> tuple[Tensor, Tensor]:
    """(N, S) rows and (N,) probabilities of the targets; ones for gradient × input, whose tokens are not weighted."""
    if method == "gradient_input":
        return gradient_input_rows(model, inputs, targets), torch.ones(len(targets))
    if method == "chefer_untrained":
        assert twin is not None
        model, method = twin, "chefer"
    result = explain_rows(
        model, inputs, targets, method=registry.find(method).name, prompt_length=start, options=options
    )
    return result.rows.cpu(), result.probabilities.cpu()
