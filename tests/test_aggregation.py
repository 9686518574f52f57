"""Token weights and response-level maps, and the choice of tokens."""

from __future__ import annotations

import pytest
import torch

import lvlm_fastxai as fx
from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.explain.aggregation import WEIGHTINGS
from lvlm_fastxai.explain.token_choice import FUNCTION_WORDS, check_tokens, choose_tokens, content_tokens

IMAGE, PROMPT = [1, 2, 3], [5, 6]


def some_rows(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(count, 10, generator=generator, dtype=torch.float64),
        torch.rand(count, generator=generator, dtype=torch.float64),
    )


def test_weights_and_maps_after_their_definition() -> None:
    rows, p = some_rows()
    found = fx.aggregate(rows, p, IMAGE, PROMPT)
    a, v = rows[:, PROMPT].mean(1), rows[:, IMAGE].mean(1)
    for_image, for_prompt = p * a / (p * a).sum(), p * v / (p * v).sum()
    torch.testing.assert_close(found.prompt_alignment, a)
    torch.testing.assert_close(found.visual_grounding, v)
    torch.testing.assert_close(found.image_weights, for_image)
    torch.testing.assert_close(found.prompt_weights, for_prompt)
    torch.testing.assert_close(found.image_map, (for_image[:, None] * rows[:, IMAGE]).sum(0))
    torch.testing.assert_close(found.prompt_map, (for_prompt[:, None] * rows[:, PROMPT]).sum(0))
    torch.testing.assert_close(found.token_scores, for_image * for_prompt)
    torch.testing.assert_close(found.confidence, p)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_parts_add_up_to_the_whole(weighting: str) -> None:
    rows, p = some_rows(7)
    whole = fx.aggregate(rows, p, IMAGE, PROMPT, weighting=weighting)
    aggregator = fx.Aggregator(IMAGE, PROMPT, weighting)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        aggregator.add(rows[part], p[part])
    for name, value in vars(aggregator.result()).items():
        torch.testing.assert_close(value, getattr(whole, name))


def test_the_ablations_weigh_by_what_they_say() -> None:
    rows, p = some_rows()
    a, v = rows[:, PROMPT].mean(1), rows[:, IMAGE].mean(1)
    for weighting, for_image, for_prompt in (
        ("confidence", p, p),
        ("prompt", a, v),
        ("uniform", torch.ones(4).double(), torch.ones(4).double()),
    ):
        found = fx.aggregate(rows, p, IMAGE, PROMPT, weighting=weighting)
        torch.testing.assert_close(found.image_weights, for_image / for_image.sum())
        torch.testing.assert_close(found.prompt_weights, for_prompt / for_prompt.sum())


def test_identity_entries_can_be_left_out() -> None:
    rows, p = some_rows(2)
    with_identity = rows.clone()
    with_identity[0, 6] += 1
    with_identity[1, 9] += 1
    found = fx.aggregate(with_identity, p, IMAGE, PROMPT, query_rows=[6, 9])
    torch.testing.assert_close(found.prompt_map, fx.aggregate(rows, p, IMAGE, PROMPT).prompt_map)
    assert (found.prompt_map - fx.aggregate(with_identity, p, IMAGE, PROMPT).prompt_map).abs().max() > 0.01


def test_tokens_without_weight_make_an_empty_map() -> None:
    found = fx.aggregate(torch.zeros(2, 10), torch.ones(2), IMAGE, PROMPT)
    assert (found.image_map == 0).all()
    assert (found.image_weights == 0).all()


def test_state_does_not_grow_with_the_sequence() -> None:
    aggregator = fx.Aggregator(IMAGE, PROMPT)
    for _ in range(50):
        aggregator.add(torch.rand(1, 5000), torch.rand(1))
    tensors = [*(aggregator._maps or ()), *(t for part in aggregator._parts for t in part)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) <= 50 * 5 * 8 + 100


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: fx.aggregate(torch.rand(2, 10), torch.rand(3), IMAGE, PROMPT), "rows"),
        (lambda: fx.aggregate(torch.rand(10), torch.rand(1), IMAGE, PROMPT), "rows"),
        (lambda: fx.aggregate(torch.rand(2, 5), torch.rand(2), IMAGE, PROMPT), "column 6"),
        (lambda: fx.aggregate(torch.rand(2, 10), torch.rand(2), [], PROMPT), "image_columns"),
        (lambda: fx.aggregate(torch.rand(2, 10), torch.rand(2), IMAGE, [-1]), "prompt_columns"),
        (lambda: fx.aggregate(torch.rand(2, 10), torch.rand(2), IMAGE, PROMPT, weighting="best"), "weighting"),
        (lambda: fx.Aggregator(IMAGE, PROMPT).result(), "at least one token"),
    ],
)
def test_wrong_arguments_are_named(call: object, name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", " red", " circle", " left", " of", " a", " blue", " square"], [1, 2, 3, 6, 7]),
        (["The", " sign", " in", " The", " Hague", "."], [1, 2, 3, 4]),
        (["It", " is", " sun", "ny", ".", " Will", " smiles", "!"], [2, 3, 6]),
        (["yes"], [0]),
        ([" two", ",", " or", " 3", "\n", "T", "-", "shirt", "s"], [0, 3, 5, 7, 8]),
        (["", "", "猫", "が", "いる"], [0, 1, 2, 3, 4]),
    ],
)
def test_content_words_whatever_the_tokenizer(pieces: list[str], expected: list[int]) -> None:
    assert content_tokens(pieces) == expected


def test_choices() -> None:
    pieces, p = ["a", " red", " dog", " and", " a", " cat"], [0.99, 0.5, 0.8, 0.97, 0.98, 0.7]
    assert choose_tokens(pieces, p, "all") == [0, 1, 2, 3, 4, 5]
    assert choose_tokens(pieces, p, "content") == [1, 2, 5]
    assert choose_tokens(pieces, p, "top:1") == [2]
    assert choose_tokens(pieces, p, "top:2") == [2, 5]
    assert choose_tokens(pieces, p, "top:4") == [0, 1, 2, 5]
    assert choose_tokens(pieces, p, "top:40") == [0, 1, 2, 3, 4, 5]
    assert choose_tokens(["it", " is"], [0.5, 0.6], "content") == [0, 1], "an answer of function words is explained"
    assert all(word == word.lower() for word in FUNCTION_WORDS)
    assert not {"yes", "no", "left", "right", "above"} & FUNCTION_WORDS


@pytest.mark.parametrize("wrong", ["none", "top", "top:", "top:0", "top:-1", "top:1.5", "content:2"])
def test_wrong_choices_are_refused(wrong: str) -> None:
    with pytest.raises(ArgumentError, match="tokens"):
        check_tokens(wrong)
