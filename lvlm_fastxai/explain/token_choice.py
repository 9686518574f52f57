"""Which tokens of an answer are worth a backward: all, those of content words, or the few most probable of these."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ArgumentError

# English articles, auxiliaries, pronouns, conjunctions and the prepositions that name no place: what says nothing about
# a picture. Words of other languages are content words all; so are "yes" and "no", which are whole answers.
_FUNCTION_WORDS = """
    a an the this that these those it its he him his she her they them their we us our you your i me my
    is are was were be been being am has have had having do does did can could may might will would shall should must
    and or but nor so yet if then than as because while of to for by with at from into about
    there here which who whom whose what where when how also very just too such
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def check_tokens(tokens: str) -> None:
    """Refuse what names no choice of tokens.

    Raises:
        ArgumentError: not "all", "content" or "top:K" with K ≥ 1.
    """
    if tokens in ("all", "content"):
        return
    head, _, count = str(tokens).partition(":")
    if head != "top" or not count.isdecimal() or int(count) < 1:
        raise ArgumentError(f'tokens: expected "all", "content" or "top:K" with K ≥ 1, got {tokens!r}')


def content_tokens(pieces: Sequence[str]) -> list[int]:
    """Indices of the tokens that belong to content words.

    A word is a run of pieces without white space between them, whatever the tokenizer; it is a content word if it has a
    letter or a digit and is no function word, or is written with a capital inside a sentence (a name).

    Args:
        pieces: each token's own text, white space included; joined, they are the answer.

    Example:
        >>> content_tokens(["a", " sm", "all", " dog", " of", " The", " Hague", "."])
        [1, 2, 3, 5, 6]
    """
    words: list[tuple[str, list[int]]] = []
    for index, piece in enumerate(pieces):
        if words and not piece[:1].isspace() and not words[-1][0][-1:].isspace():
            words[-1] = (words[-1][0] + piece, [*words[-1][1], index])
        else:
            words.append((piece, [index]))
    chosen: list[int] = []
    starts_sentence = True
    for text, indices in words:
        bare = "".join(letter for letter in text if letter.isalnum() or letter in "'’-").strip("'’-")
        named = bare[:1].isupper() and not starts_sentence and bare != "I"
        if bare and (named or bare.lower() not in FUNCTION_WORDS):
            # Punctuation aside; a piece without text is the first part of a character of several tokens.
            chosen += [i for i in indices if not pieces[i].strip() or any(map(str.isalnum, pieces[i]))]
        if bare:
            starts_sentence = False
        if text.rstrip()[-1:] in (".", "!", "?"):
            starts_sentence = True
    return chosen


def choose_tokens(pieces: Sequence[str], probabilities: Sequence[float], tokens: str) -> list[int]:
    """Indices of the tokens to explain, ascending; at least one.

    Args:
        pieces: each token's own text; joined, they are the answer.
        probabilities: of the tokens, as they were generated: known before any backward.
        tokens: "all"; "content", the content words' (:func:`content_tokens`), all where there is none; "top:K", the K
            most probable of those, filled up with the most probable others.

    Raises:
        ArgumentError: ``tokens`` is none of these.

    Example:
        >>> choose_tokens(["a", " red", " dog"], [0.9, 0.5, 0.8], "top:1")
        [2]
    """
    check_tokens(tokens)
    everything = list(range(len(pieces)))
    if tokens == "all":
        return everything
    content = content_tokens(pieces) or everything
    if tokens == "content":
        return content
    inside = set(content)
    ranked = sorted(everything, key=lambda index: (index not in inside, -probabilities[index]))
    return sorted(ranked[: int(tokens.partition(":")[2])])
