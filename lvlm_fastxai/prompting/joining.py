"""A prompt and its answer as one teacher-forced input; where the question stands in it."""

from __future__ import annotations

from collections.abc import Sequence

# Inputs with one entry per position, and what an answer's position holds. All others belong to the pictures.
ANSWER_FILL = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
# PaliGemma's type 1 is the suffix that attends causally; its prefix, type 0, attends both ways.
SUFFIX_TYPE_FAMILIES = ("paligemma",)


def find_question(pieces: Sequence[str], question: str) -> set[int]:
    """Indices of the pieces that spell the question; white space and case aside, since tokenizers change both."""
    spelled: list[tuple[str, int]] = [
        (letter, index) for index, piece in enumerate(pieces) for letter in piece.casefold() if not letter.isspace()
    ]
    wanted = "".join(question.casefold().split())
    start = "".join(letter for letter, _ in spelled).rfind(wanted)
    if start < 0:
        # Unknown words or normalisation: all of the prompt's text is shown rather than none.
        return set(range(len(pieces)))
    return {index for _, index in spelled[start : start + len(wanted)]}
