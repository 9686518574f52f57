"""The answer of one call of the explainer: generated, its tokens chosen, with what the explanation takes from it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FastXAIError
from ..prompting.answering import Answer, Answerer
from ..prompting.inputs import Inputs, longest
from ..sweep.forward import Recording
from ..sweep.recording import Recorder
from .data import UntouchedToken
from .reading import Explained
from .relevancy_rows import RelevancyRows
from .token_choice import choose_tokens


@dataclass(frozen=True)
class Said:
    """An answer, and what the explanation takes from its generation.

    Attributes:
        answer: as it was generated.
        pieces: place in the answer → text, of the tokens that are text and not special.
        chosen: places of those that are explained.
        prompt_length: number of columns before the answer.
        recording: of the generation, where one could be made.
        steps: of the head, one per token; None without a head.
        seconds: that the generation took.
    """

    answer: Answer
    pieces: dict[int, str]
    chosen: list[int]
    prompt_length: int
    recording: Recording | None
    steps: Sequence[Any] | None
    seconds: float

    @property
    def length(self) -> int:
        """Of prompt and answer together."""
        return self.prompt_length + len(self.answer.token_ids)

    @property
    def targets(self) -> list[tuple[int, int, int]]:
        """(sample, query_row, token_id) of each chosen token."""
        return [(0, self.prompt_length + place - 1, self.answer.token_ids[place]) for place in self.chosen]

    @property
    def chosen_steps(self) -> list[Any] | None:
        """Of the head, for each chosen token; None without a head."""
        return None if self.steps is None else [self.steps[place] for place in self.chosen]

    @property
    def entropies(self) -> list[float] | None:
        """Of the chosen tokens' predicted maps; None without a head."""
        return None if self.steps is None else [self.steps[place].entropy() for place in self.chosen]

    def explained(self) -> Explained:
        """The chosen tokens."""
        return Explained(
            [self.pieces[place] for place in self.chosen],
            [self.answer.token_ids[place] for place in self.chosen],
            [self.prompt_length + place for place in self.chosen],
        )

    def untouched(self) -> list[UntouchedToken]:
        """The tokens of text that are not chosen."""
        tokens, probabilities = self.answer.token_ids, self.answer.probabilities
        return [
            UntouchedToken(piece, tokens[place], self.prompt_length + place, probabilities[place])
            for place, piece in self.pieces.items()
            if place not in self.chosen
        ]

    def remarks(self, model: Any, max_new_tokens: int, found: RelevancyRows, *, predicted: bool) -> list[str]:
        """Say what readers of the explanation should know of the answer and its rows."""
        notes = []
        if not self.answer.ended and len(self.answer.token_ids) >= max_new_tokens:
            notes.append(f"The answer was cut at {max_new_tokens} tokens (max_new_tokens).")
        limit = longest(model)
        if limit is not None and self.length > limit:
            notes.append(f"Prompt and answer have {self.length} positions, and the model was made for {limit}.")
        if predicted:
            notes.append("The FastRM head maps the image alone: prompt and earlier tokens have no values.")
        if found.fallback is not None:
            notes.append(f"Every layer was swept whole, row_tolerance had no effect. {found.fallback}.")
        return notes


def generate_and_choose(
    answerer: Answerer,
    inputs: Inputs,
    max_new_tokens: int,
    tokens: str,
    *,
    recorder: Recorder | None = None,
    live: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Said:
    """Generate the answer of one prompt, and choose the tokens that are explained.

    Args:
        answerer: model and processor.
        inputs: of one prompt.
        max_new_tokens: longest answer.
        tokens: which are explained; see `choose_tokens`.
        recorder: keeps the pass for a sweep.
        live: of a head, gives every token its predicted map.
        progress: called as ``progress(tokens, max_new_tokens)``.

    Raises:
        ArgumentError: logits that are NaN.
        FastXAIError: there is no token to explain.
    """
    started = time.perf_counter()
    with live or contextlib.nullcontext():
        (answer,) = answerer.generate(
            inputs,
            max_new_tokens,
            keep_logits=recorder is not None or tokens != "all",
            recorder=recorder,
            streamer=live,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    spoken = answerer.spoken(answer.token_ids)
    if not spoken:
        raise FastXAIError("the model answered with nothing: there is no token to explain; ask differently")
    pieces = answerer.pieces([answer.token_ids[place] for place in spoken])
    chosen = choose_tokens(pieces, [answer.probabilities[place] for place in spoken], tokens)
    return Said(
        answer,
        dict(zip(spoken, pieces, strict=True)),
        [spoken[index] for index in chosen],
        inputs["input_ids"].shape[1],
        None if recorder is None else recorder.recording()[0],
        None if live is None else live.steps,
        seconds,
    )
