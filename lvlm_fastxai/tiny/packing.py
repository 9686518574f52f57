"""Many questions about one picture in one sequence, computed exactly as each would be alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from .data import KINDS, Pool
from .model import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    NUM_IMAGE_TOKENS,
    PAD,
    USER,
    build_tokenizer,
    vocabulary,
)


@dataclass
class TokenizedQuestions:
    """The questions of a pool as flat arrays.

    Attributes:
        tokens: all blocks one after the other, int64; a block is question, ``<assistant>``, answer, ``<eos>``.
        start, length, answer_start: (Q,) int64, where a block begins, its length, and where in it the answer begins.
        kind: (Q,) int64, index into :data:`KINDS`.
        first: (N + 1,) int64, the questions of picture n are ``first[n]:first[n + 1]``.
    """

    tokens: np.ndarray
    start: np.ndarray
    length: np.ndarray
    answer_start: np.ndarray
    kind: np.ndarray
    first: np.ndarray


def tokenize(pool: Pool) -> TokenizedQuestions:
    """Token blocks of every question of ``pool``.

    Raises:
        ValueError: if a word is not in the vocabulary.
    """
    ids = vocabulary()
    encode = build_tokenizer()
    known: dict[str, list[int]] = {}

    def words(text: str) -> list[int]:
        if text not in known:
            known[text] = encode(text, add_special_tokens=False)["input_ids"]
            if encode.unk_token_id in known[text]:
                raise ValueError(f"a word is missing in the vocabulary: {text!r}")
        return known[text]

    tokens: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    first = [0]
    for questions in pool.questions:
        for question in questions:
            prompt = [*words(question.text), ids[ASSISTANT]]
            block = [*prompt, *words(question.answer), ids[EOS]]
            rows.append((len(tokens), len(block), len(prompt), KINDS.index(question.kind)))
            tokens.extend(block)
        first.append(len(rows))
    start, length, answer_start, kind = np.array(rows, dtype=np.int64).T
    return TokenizedQuestions(np.array(tokens, dtype=np.int64), start, length, answer_start, kind, np.array(first))


def prefix_ids() -> list[int]:
    """Tokens before every question: beginning, user, and the image tokens."""
    ids = vocabulary()
    return [ids[BOS], ids[USER], *[ids[IMAGE]] * NUM_IMAGE_TOKENS]


@dataclass
class Packed:
    """Sequences that hold many questions each.

    Attributes:
        input_ids, position_ids: (B, S) int64.
        mask: (B, 1, S, S) bool, True where a row may see a column.
        rows: (A,) int64, flat positions (b·S + s) whose next token is an answer token.
        targets: (A,) int64, that next token.
        owner: (A,) int64, running number of the question it belongs to.
        weight: (A,) fp32, such that a question of n answer tokens counts √n in the loss.
        kinds: (Q,) int64, kind of each question.
        starts: (Q,) int64, where in its sequence each question begins.
        blocks: how many questions each sequence holds.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    weight: torch.Tensor
    kinds: torch.Tensor
    starts: torch.Tensor
    blocks: list[int]


def pack(questions: Sequence[tuple[TokenizedQuestions, np.ndarray]]) -> Packed:
    """One sequence per entry: the image prefix, then each question of the entry as a block of its own.

    A block sees the prefix and itself and its positions continue the prefix's, exactly as if it stood alone.

    Args:
        questions: per picture its table and the indices (q,) of the questions to pack.
    """
    prefix = prefix_ids()
    size = max(len(prefix) + int(table.length[chosen].sum()) for table, chosen in questions)
    input_ids = np.full((len(questions), size), vocabulary()[PAD], dtype=np.int64)
    position_ids = np.zeros((len(questions), size), dtype=np.int64)
    block = np.full((len(questions), size), -1, dtype=np.int64)
    rows, targets, owner, weight = [], [], [], []
    kinds: list[int] = []
    starts: list[int] = []
    for b, (table, chosen) in enumerate(questions):
        input_ids[b, : len(prefix)] = prefix
        position_ids[b, : len(prefix)] = np.arange(len(prefix))
        block[b, : len(prefix)] = 0
        at = len(prefix)
        for number, q in enumerate(chosen, start=1):
            start, length, answer = int(table.start[q]), int(table.length[q]), int(table.answer_start[q])
            input_ids[b, at : at + length] = table.tokens[start : start + length]
            position_ids[b, at : at + length] = np.arange(len(prefix), len(prefix) + length)
            block[b, at : at + length] = number
            rows.append(b * size + np.arange(at + answer - 1, at + length - 1))
            targets.append(table.tokens[start + answer : start + length])
            owner.append(np.full(length - answer, len(kinds)))
            weight.append(np.full(length - answer, 1 / math.sqrt(length - answer), dtype=np.float32))
            kinds.append(int(table.kind[q]))
            starts.append(at)
            at += length
    blocks = torch.from_numpy(block)
    order = torch.arange(size)
    seen = (blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None])
    mask = (seen & (order[None, :, None] >= order[None, None, :]))[:, None]
    return Packed(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        mask,
        rows=torch.from_numpy(np.concatenate(rows)),
        targets=torch.from_numpy(np.concatenate(targets)),
        owner=torch.from_numpy(np.concatenate(owner)),
        weight=torch.from_numpy(np.concatenate(weight)),
        kinds=torch.tensor(kinds),
        starts=torch.tensor(starts),
        blocks=[len(chosen) for _, chosen in questions],
    )


def answer_logits(
    model: LlavaForConditionalGeneration, pixel_values: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (A, vocabulary) at ``packed.rows``, the tower's patch states (B, patches, width), and the decoder's states
    (B, S, width) after half of its layers.

    The same modules in the same order as ``model.forward``. Spelt out because ``output_hidden_states`` patches the
    modules while it runs, which two threads must not do at once.
    """
    llava = model.model
    states = llava.vision_tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
    image_tokens = llava.multi_modal_projector(states)
    embeddings = model.get_input_embeddings()(packed.input_ids)
    where = packed.input_ids == model.config.image_token_id
    embeddings = embeddings.masked_scatter(where[..., None], image_tokens.to(embeddings.dtype))
    decoder = llava.language_model
    rotary = decoder.rotary_emb(embeddings, packed.position_ids)
    hidden = half = embeddings
    for index, layer in enumerate(decoder.layers):
        hidden = layer(hidden, attention_mask=packed.mask, position_ids=packed.position_ids, position_embeddings=rotary)
        if index == len(decoder.layers) // 2 - 1:
            half = hidden
    hidden = decoder.norm(hidden)
    return model.lm_head(hidden.flatten(0, 1)[packed.rows]), states, half


def normalize(images: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
    """(B, 96, 96, 3) uint8 to (B, 3, 96, 96) fp32 as the image processor does; mild brightness and contrast jitter with
    ``rng``."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
    if rng is not None:
        gain = torch.from_numpy(rng.uniform(0.94, 1.06, (len(images), 1, 1, 1)).astype(np.float32))
        shift = torch.from_numpy(rng.uniform(-0.03, 0.03, (len(images), 3, 1, 1)).astype(np.float32))
        pixels = ((pixels - 0.5) * gain + 0.5 + shift).clamp_(0, 1)
    return (pixels - 0.5) / 0.25
