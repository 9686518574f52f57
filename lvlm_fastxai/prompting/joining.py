"""A prompt and its answer as one teacher-forced input; which token spells what of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import families
from ..errors import UnknownFamilyError
from .inputs import Inputs

# Inputs with one entry per position, and what an answer's position holds. All others belong to the pictures.
_ANSWER_FILL = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}


def join(config: Any, inputs: Mapping[str, Any], answers: Sequence[Sequence[int]]) -> Inputs:
    """Put answers behind their prompts, with every per-position input extended likewise.

    Args:
        config: the model's.
        inputs: processor outputs of B prompts, which all end at the last column.
        answers: token ids of B answers, all of one length.

    Returns:
        The inputs of one teacher-forced pass.
    """
    try:
        suffix_type = families.find(config).suffix_type
    except UnknownFamilyError:
        suffix_type = 0
    tokens = inputs["input_ids"]
    tail = torch.tensor(answers, dtype=tokens.dtype, device=tokens.device)
    joined = {**inputs, "input_ids": torch.cat([tokens, tail], 1)}
    for name, fill in {**_ANSWER_FILL, "token_type_ids": suffix_type}.items():
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.shape == tokens.shape:
            joined[name] = torch.cat([value, torch.full_like(tail, fill, dtype=value.dtype)], 1)
    return joined


def decode(tokenizer: Any, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Give the text of some tokens, spaces as the tokenizer gives them."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Split an answer into each token's own text, which depends on its neighbours; joined, they are the text of all."""
    found, before = [], ""
    for end in range(1, len(tokens) + 1):
        after = decode(tokenizer, tokens[:end], skip_special_tokens=False)
        # A character of several byte tokens appears whole at its last token.
        complete = after.rstrip("\ufffd") if end < len(tokens) else after
        complete = complete if complete.startswith(before) else after
        found.append(complete[len(before) :] if complete.startswith(before) else complete)
        before = complete
    return found


def find_question(pieces: Sequence[str], question: str) -> set[int]:
    """Find the pieces that spell the question; white space and case aside, since tokenizers change both.

    Example:
        >>> sorted(find_question(["<user>", " what", " is", " it", "?", "<assistant>"], "What is it?"))
        [1, 2, 3, 4]
    """
    spelled: list[tuple[str, int]] = [
        (letter, index) for index, piece in enumerate(pieces) for letter in piece.casefold() if not letter.isspace()
    ]
    wanted = "".join(question.casefold().split())
    start = "".join(letter for letter, _ in spelled).rfind(wanted)
    if start < 0:
        # Unknown words or normalisation: all of the prompt's text is shown rather than none.
        return set(range(len(pieces)))
    return {index for _, index in spelled[start : start + len(wanted)]}
