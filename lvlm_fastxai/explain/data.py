"""What an explanation holds: an answer, its tokens, and the relevancy of everything before each of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

__all__ = [
    "ANSWER_DEFINITION",
    "CONFIDENCE_DEFINITION",
    "SCHEMA",
    "WEIGHTED_DEFINITION",
    "Comparison",
    "ExplainedImage",
    "ExplanationData",
    "PromptToken",
    "Pruned",
    "TokenExplanation",
    "TokenWeight",
    "UntouchedToken",
]

SCHEMA = "lvlm-fastxai/explanation/1"

CONFIDENCE_DEFINITION = "geometric mean of the probabilities of the answer's tokens"
ANSWER_DEFINITION = "arithmetic mean of the raw values over the answer's tokens"
WEIGHTED_DEFINITION = (
    "sum of the tokens' values, weighted by probability times prompt alignment for the image and by probability times "
    "visual grounding for the prompt (GLIMPSE)"
)


@dataclass(frozen=True)
class ExplainedImage:
    """One picture and the part of it that the model's patch grid covers.

    Attributes:
        picture: the RGB picture as it was given.
        region: (left, top, right, bottom) in pixels of `picture`, where `image_map` lies. A processor that crops to a
            centred square covers less than the picture, one that pads to a square covers more (negative corners).
    """

    picture: Image.Image
    region: tuple[float, float, float, float]


@dataclass(frozen=True)
class PromptToken:
    """One text token of the prompt: text, id, position in the sequence, and whether it belongs to the question."""

    text: str
    token_id: int
    position: int
    in_question: bool


@dataclass(frozen=True)
class Pruned:
    """What a pruned sweep kept for one token.

    Attributes:
        rows_kept: positions of each decoder layer that took part, bottom layer first.
        dropped: share of the gradient norm whose rows were left out, at each layer.
        estimated_error: of the token's relevancy, relative L1; the true error was below it in at least 95 % of the
            held-out cases of docs/pruned-sweep.md.
    """

    rows_kept: list[int]
    dropped: list[float]
    estimated_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for `json.dump`."""
        return asdict(self)


@dataclass(frozen=True)
class TokenWeight:
    """What an answer token counts for in the answer's maps: GLIMPSE, arXiv 2506.18985.

    Attributes:
        prompt_alignment: a, mean relevancy of the question's tokens, identity entry left out.
        visual_grounding: v, mean relevancy of the image's tokens.
        image_weight: β^V = p·a over its sum, the weight in the answer's image map.
        prompt_weight: β^P = p·v over its sum, the weight in the answer's prompt scores.
        score: γ = β^V·β^P.
    """

    prompt_alignment: float
    visual_grounding: float
    image_weight: float
    prompt_weight: float
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for `json.dump`."""
        return asdict(self)


@dataclass(frozen=True)
class UntouchedToken:
    """An answer token that was not explained: text, id, position, and the probability it was generated with."""

    text: str
    token_id: int
    position: int
    probability: float


@dataclass(frozen=True)
class Comparison:
    """Another method's maps of the same answer, the mean over the explained tokens: one (h, w) fp32 map per image, and
    (P,) fp32 scores of the prompt's text tokens."""

    method: str
    image_maps: list[NDArray[np.float32]]
    prompt_scores: NDArray[np.float32]

    def to_dict(self) -> dict[str, Any]:
        """Give plain lists, numbers and strings, ready for `json.dump`."""
        return {
            "method": self.method,
            "image_maps": [_plain(m) for m in self.image_maps],
            "prompt_scores": _plain(self.prompt_scores),
        }


@dataclass(frozen=True)
class TokenExplanation:
    """Relevancy of everything before one answer token.

    Attributes:
        text: the token's text; joined over all tokens it gives `Explanation.answer`, but for white space at both ends.
        token_id: index in the vocabulary.
        position: where the token stands in prompt + answer. The explained logit stands at `position - 1`.
        probability: softmax of the raw logits at that row (temperature 1, no logits processor).
        logit: the explained scalar.
        image_maps: one (h, w) fp32 map per image on the model's patch grid, raw relevancy; empty for an unknown family.
        prompt_scores: (P,) fp32 raw relevancy, one per text token of the prompt, in the order of
            `Explanation.prompt_tokens`.
        shares: where the raw relevancy of the row lies, self entry left out: sums over "image", "question", "template"
            (the rest of the prompt's text) and "answer" (the answer's earlier tokens).
        pruned: what a pruned sweep kept; None if the row is exact.
        weight: what the token counts for in the answer's maps; None for a method that weights all alike.
        entropy: of the map that a FastRM head predicts for the token, in 0 … 1; low where it is concentrated. None
            without a head.
    """

    text: str
    token_id: int
    position: int
    probability: float
    logit: float
    image_maps: list[NDArray[np.float32]]
    prompt_scores: NDArray[np.float32]
    shares: dict[str, float]
    pruned: Pruned | None = None
    weight: TokenWeight | None = None
    entropy: float | None = None

    @property
    def image_map(self) -> NDArray[np.float32]:
        """The first image's (h, w) map."""
        return _first(self.image_maps)

    def to_dict(self) -> dict[str, Any]:
        """Give plain lists, numbers and strings, ready for `json.dump`."""
        return {
            "text": self.text,
            "token_id": self.token_id,
            "position": self.position,
            "probability": self.probability,
            "logit": self.logit,
            "image_maps": [_plain(m) for m in self.image_maps],
            "prompt_scores": _plain(self.prompt_scores),
            "shares": self.shares,
            "pruned": None if self.pruned is None else self.pruned.to_dict(),
            "weight": None if self.weight is None else self.weight.to_dict(),
            "entropy": self.entropy,
        }


@dataclass
class ExplanationData:
    """Hold an answer with the relevancy of every token of it.

    All maps and scores are raw relevancy (fp32, no unit, not normalised, never negative for `chefer`): values of tokens
    with different logits can be compared within one token, and only with care between tokens.

    Attributes:
        question, answer: the texts.
        tokens: one `TokenExplanation` per explained answer token; special tokens are left out.
        prompt_tokens: the prompt's text tokens, aligned with every `prompt_scores`.
        images: the pictures with the rectangle that the maps cover.
        method, memory, row_tolerance: how it was computed.
        backend: which implementation of the kernel ran.
        seconds: wall time of the parts, {"generate": …, "explain": …}.
        peak_bytes: peak memory of the explanation beyond the model itself, as far as it could be measured, else None.
        model_name, model_class, device, dtype: what was explained.
        sequence_length, prompt_length: positions in prompt + answer, and in the prompt.
        versions: of this package, torch, transformers and Python.
        command: a command line that computes it again; empty if called from Python.
        notes: what the reader must know (for example why there is no image map).
        options: of the method, by name; empty for a method without any.
        chosen_tokens: "all", "content" or "top:K".
        untouched: the answer's tokens that were not chosen, special tokens left out.
        comparison: another method's maps of the same answer.
        decision: of a policy on this answer, {"verdict": "accept" or "review", "score": …, "reason": …}; None without.
    """

    question: str
    answer: str
    tokens: list[TokenExplanation]
    prompt_tokens: list[PromptToken]
    images: list[ExplainedImage]
    method: str
    memory: str
    row_tolerance: float | str
    backend: str
    seconds: dict[str, float]
    peak_bytes: int | None
    model_name: str
    model_class: str
    device: str
    dtype: str
    sequence_length: int
    prompt_length: int
    versions: dict[str, str]
    command: str = ""
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    chosen_tokens: str = "all"
    untouched: list[UntouchedToken] = field(default_factory=list)
    comparison: Comparison | None = None
    decision: dict[str, Any] | None = None

    @property
    def weighted(self) -> bool:
        """Whether the answer's maps weight its tokens."""
        return all(token.weight is not None for token in self.tokens)

    @property
    def image_maps(self) -> list[NDArray[np.float32]]:
        """One (h, w) fp32 map per image for the whole answer: the mean of its tokens' raw maps, or their sum by
        `TokenWeight.image_weight`."""
        weights = [1 / len(self.tokens) if t.weight is None else t.weight.image_weight for t in self.tokens]
        return [
            np.einsum("t,thw->hw", weights, np.stack(maps, dtype=np.float64)).astype(np.float32)
            for maps in zip(*(t.image_maps for t in self.tokens), strict=True)
        ]

    @property
    def image_map(self) -> NDArray[np.float32]:
        """The first image's map for the whole answer, (h, w) fp32. ArgumentError if the family has no known grid."""
        return _first(self.image_maps)

    @property
    def prompt_scores(self) -> NDArray[np.float32]:
        """(P,) fp32: the mean over the answer's tokens of their raw scores on the prompt's text tokens; or their sum by
        `TokenWeight.prompt_weight`, identity entries left out."""
        if not self.weighted:
            return np.mean([t.prompt_scores for t in self.tokens], axis=0, dtype=np.float32)
        total = np.zeros(len(self.prompt_tokens))
        for token in self.tokens:
            own = np.array([prompt_token.position == token.position - 1 for prompt_token in self.prompt_tokens])
            assert token.weight is not None
            total += token.weight.prompt_weight * (token.prompt_scores - own)
        return total.astype(np.float32)

    @property
    def untouched_share(self) -> float:
        """Share of the answer's probability mass, Σ p, that lies on tokens which were not explained."""
        left_out = sum(token.probability for token in self.untouched)
        total = left_out + sum(token.probability for token in self.tokens)
        return left_out / total if total > 0 else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Mean over the answer's tokens of `TokenExplanation.shares`."""
        return {part: float(np.mean([t.shares[part] for t in self.tokens])) for part in self.tokens[0].shares}

    @property
    def estimated_error(self) -> float:
        """The largest estimated relative error of a token's relevancy; 0 where every row is exact."""
        return max((t.pruned.estimated_error for t in self.tokens if t.pruned is not None), default=0.0)

    @property
    def share_of_rows(self) -> float:
        """Share of the sequence's positions that the sweep visited, mean over layers and tokens; 1 where exact."""
        kept = [np.mean(t.pruned.rows_kept) / self.sequence_length if t.pruned else 1.0 for t in self.tokens]
        return float(np.mean(kept))

    @property
    def entropy(self) -> float | None:
        """Mean entropy of the explained tokens' predicted maps, in 0 … 1; None without a FastRM head."""
        found = [t.entropy for t in self.tokens if t.entropy is not None]
        return float(np.mean(found)) if found else None

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities, in 0 … 1. It says how sure the model was, not how right."""
        probabilities = np.array([*(t.probability for t in self.tokens), *(t.probability for t in self.untouched)])
        return float(np.exp(np.log(np.maximum(probabilities, 1e-300)).mean()))

    def to_dict(self) -> dict[str, Any]:
        """Give everything but the pictures as plain lists, numbers and strings, ready for `json.dump`."""
        return {
            "schema": SCHEMA,
            "question": self.question,
            "answer": self.answer,
            "confidence": self.confidence,
            "confidence_definition": CONFIDENCE_DEFINITION,
            "entropy": self.entropy,
            "decision": self.decision,
            **self._origin(),
            "images": [
                {"width": i.picture.width, "height": i.picture.height, "region": list(i.region)} for i in self.images
            ],
            "prompt_tokens": [asdict(token) for token in self.prompt_tokens],
            "answer_definition": WEIGHTED_DEFINITION if self.weighted else ANSWER_DEFINITION,
            "image_maps": [_plain(m) for m in self.image_maps],
            "prompt_scores": _plain(self.prompt_scores),
            "shares": self.shares,
            "tokens": [token.to_dict() for token in self.tokens],
            "untouched": [asdict(token) for token in self.untouched],
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
        }

    def _origin(self) -> dict[str, Any]:
        """How it was computed, in the order of `to_dict`."""
        return {
            "method": self.method,
            "options": self.options,
            "chosen_tokens": self.chosen_tokens,
            "untouched_share": self.untouched_share,
            "memory": self.memory,
            "row_tolerance": self.row_tolerance,
            "backend": self.backend,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "model": {
                "name": self.model_name,
                "class": self.model_class,
                "device": self.device,
                "dtype": self.dtype,
            },
            "sequence_length": self.sequence_length,
            "prompt_length": self.prompt_length,
            "versions": self.versions,
            "command": self.command,
            "notes": self.notes,
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(answer={self.answer!r}, confidence={self.confidence:.3f}, "
            f"tokens={len(self.tokens)}, method={self.method!r}, seconds={sum(self.seconds.values()):.3f})"
        )


def _first(maps: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    if not maps:
        raise ArgumentError("there is no image map: the model's family has no known patch grid (see .notes)")
    return maps[0]


def _plain(array: NDArray[np.float32]) -> Any:
    """Nested lists whose numbers are the shortest decimals that read back as the same fp32 value."""
    if array.ndim > 1:
        return [_plain(part) for part in array]
    return [float(str(value)) for value in array.astype(np.float32)]
