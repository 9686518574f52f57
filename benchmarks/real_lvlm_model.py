"""SmolLM2 with low-rank adapters on many questions about a picture at once, and the LLaVA that comes out of it.

As in the shipped LVLM's training (``lvlm_fastxai/tiny/packing.py``) each question sees the picture's tokens and itself,
at the positions it would have alone. Here the attention is also computed that way, the picture's tokens among
themselves and each question's against the picture and itself, instead of under a mask: with 16 questions behind 256
image tokens a mask would hide three of four scores that had been computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaModel, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from . import real_lvlm_data as data

IMAGE = "<image>"
# SmolLM2's own turns; a picture goes before its question, without a word between them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BEFORE, BETWEEN, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


# Sequences


@dataclass
class Block:
    """One question as tokens: what stands behind the image tokens, and where in it the answer begins."""

    tokens: list[int]
    answer: int


@dataclass
class Packed:
    """Questions about B pictures, end to end without padding: T tokens, N questions of at most L tokens.

    Attributes:
        tokens, positions: (T,) int64; the tokens under the picture's are 0.
        images: (B x patches,) int64, where the image tokens stand.
        prefix: (B, P) int64, where each picture's prefix stands.
        blocks: (N, L) int64, where each question's tokens stand; 0 behind its end.
        filled: (N, L) bool, which of those are its own.
        picture: (N,) int64, whose prefix each question sees.
        rows, targets, question: (A,) int64, positions whose next token is an answer's, that token, its question.
    """

    tokens: Tensor
    positions: Tensor
    images: Tensor
    prefix: Tensor
    blocks: Tensor
    filled: Tensor
    picture: Tensor
    rows: Tensor
    targets: Tensor
    question: Tensor


def pack(before: Sequence[int], total: int, patches: Tensor, pictures: Sequence[Sequence[Block]]) -> Packed:
    """``before``, then image tokens, then each question of each picture.

    Args:
        total: how many patches a picture has.
        patches: (B, K) int64, which of them are there, ascending; each keeps the position it has among all of them.
    """
    first, size = len(before), len(before) + patches.shape[1]
    tokens: list[int] = []
    positions: list[int] = []
    prefix, places, owners, rows, targets, question = [], [], [], [], [], []
    for number, (kept, asked) in enumerate(zip(patches.tolist(), pictures, strict=True)):
        prefix.append(list(range(len(tokens), len(tokens) + size)))
        tokens += [*before, *[0] * len(kept)]
        positions += [*range(first), *(first + patch for patch in kept)]
        for block in asked:
            start = len(tokens)
            places.append(list(range(start, start + len(block.tokens))))
            tokens += block.tokens
            positions += range(first + total, first + total + len(block.tokens))
            rows += range(start + block.answer - 1, start + len(block.tokens) - 1)
            targets += block.tokens[block.answer :]
            question += [len(owners)] * (len(block.tokens) - block.answer)
            owners.append(number)
    longest = max(map(len, places))
    lengths = torch.tensor([len(each) for each in places])
    all_prefixes = torch.tensor(prefix)
    return Packed(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        images=all_prefixes[:, first:].reshape(-1),
        prefix=all_prefixes,
        blocks=torch.tensor([[*each, *[0] * (longest - len(each))] for each in places]),
        filled=torch.arange(longest)[None, :] < lengths[:, None],
        picture=torch.tensor(owners),
        rows=torch.tensor(rows),
        targets=torch.tensor(targets),
        question=torch.tensor(question),
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """(T, heads, d) of causal attention in every picture's prefix, and of every question on its prefix and itself.

    Args:
        query: (T, heads, d).
        key, value: (T, key-value heads, d).
    """
    heads, groups = query.shape[1], key.shape[1]
    size, (count, longest) = packed.prefix.shape[1], packed.blocks.shape
    # index_select: the gradient of plain indexing is an order of magnitude slower on the CPU.
    p_query, p_key, p_value = (_grouped(each, packed.prefix, groups) for each in (query, key, value))
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    seen = _attend(p_query, p_key, p_value, causal.repeat(heads // groups, 1))
    b_query, b_key, b_value = (_grouped(each, packed.blocks, groups) for each in (query, key, value))
    b_key, b_value = (
        torch.cat([prefix.index_select(0, packed.picture), own], 2)
        for prefix, own in ((p_key, b_key), (p_value, b_value))
    )
    own = packed.filled[:, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()  # (N, L, L)
    mask = torch.cat([own.new_ones(count, longest, size), own], 2).repeat(1, heads // groups, 1)[:, None]
    asked = _attend(b_query, b_key, b_value, mask)
    out = torch.zeros_like(query).index_copy(0, packed.prefix.reshape(-1), _ungrouped(seen, size))
    filled = packed.filled.reshape(-1).nonzero()[:, 0]
    return out.index_copy(0, packed.blocks[packed.filled], _ungrouped(asked, longest).index_select(0, filled))


def _grouped(states: Tensor, places: Tensor, groups: int) -> Tensor:
    """(n, groups, heads / groups x L, d) at ``places`` (n, L): query heads of one key head are more rows of it."""
    n, length = places.shape
    taken = states.index_select(0, places.reshape(-1)).view(n, length, groups, -1, states.shape[-1])
    return taken.permute(0, 2, 3, 1, 4).reshape(n, groups, -1, states.shape[-1])


def _ungrouped(states: Tensor, length: int) -> Tensor:
    """(n x L, heads, d), the way back."""
    n, groups, _, width = states.shape
    return states.view(n, groups, -1, length, width).permute(0, 3, 1, 2, 4).reshape(n * length, -1, width)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    # Spelt out: the backward of the fused one takes three times as long on the CPU for rows this short.
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


# The language model


class Adapter(nn.Module):
    """A frozen matrix W (out, in) in bf16 and a low-rank addition to it: W + 2BA."""

    scale = 2.0

    def __init__(self, weights: Sequence[Tensor], rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        # Matrices of one input side by side: one product, one adapter.
        self.sizes = [len(weight) for weight in weights]
        weight = torch.cat([each.detach() for each in weights])
        self.register_buffer("weight", weight.to(dtype), persistent=False)
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, x: Tensor) -> Tensor:
        small = F.linear(x, self.down.to(x.dtype))
        return F.linear(x, self.weight) + F.linear(small, (self.scale * self.up).to(x.dtype))

    def additions(self) -> list[Tensor]:
        """What to add to each of the matrices."""
        return list((self.scale * self.up @ self.down).detach().split(self.sizes))


_FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class AdaptedDecoder(nn.Module):
    """The layers of a Llama with an :class:`Adapter` in place of every matrix, on packed sequences.

    Args:
        model: the Llama; it is read and not changed.
        head: (vocabulary, width), what its states become logits by.
        rank: of the adapters.
        dtype: of the frozen weights and the activations.
    """

    def __init__(self, model: LlamaModel, head: Tensor, rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = model.config
        self.rotary = model.rotary_emb
        self.adapters = nn.ModuleList(
            nn.ModuleList(Adapter([layer.get_submodule(n).weight for n in names], rank, dtype) for names in _FUSED)
            for layer in model.layers
        )
        norms = [each for layer in model.layers for each in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.norms = [each.weight.detach().to(dtype) for each in (*norms, model.norm)]
        self.embeddings = model.get_input_embeddings().weight.detach().to(dtype)
        self.head = head.detach().to(dtype)

    def _norm(self, x: Tensor, number: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[number], self.config.rms_norm_eps)

    def forward(self, image_tokens: Tensor, packed: Packed) -> Tensor:
        """(A, vocabulary) logits at the rows before the answers' tokens. ``image_tokens``: (B x patches, width)."""
        hidden = self.embeddings[packed.tokens].index_copy(0, packed.images, image_tokens.to(self.embeddings.dtype))
        cosine, sine = (each[0][:, None] for each in self.rotary(hidden[None], packed.positions[None]))  # (T, 1, d)
        heads, groups, width = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        for number, (attention_in, attention_out, mlp_in, mlp_out) in enumerate(self.adapters):
            states = attention_in(self._norm(hidden, 2 * number)).view(len(hidden), -1, width)
            turned = states[:, : heads + groups]
            half = turned.shape[-1] // 2
            turned = turned * cosine + torch.cat([-turned[..., half:], turned[..., :half]], -1) * sine
            seen = packed_attention(turned[:, :heads], turned[:, heads:], states[:, heads + groups :], packed)
            hidden = hidden + attention_out(seen.flatten(1))
            gate, up = mlp_in(self._norm(hidden, 2 * number + 1)).chunk(2, -1)
            hidden = hidden + mlp_out(F.silu(gate) * up)
        return F.linear(self._norm(hidden[packed.rows], -1), self.head)

    @torch.no_grad()
    def merge_into(self, model: LlamaModel) -> None:
        """Add the adapters to the matrices of ``model``, a copy of the one they were made for."""
        for layer, adapters in zip(model.layers, self.adapters, strict=True):
            for names, adapter in zip(_FUSED, adapters, strict=True):
                for name, addition in zip(names, adapter.additions(), strict=True):
                    layer.get_submodule(name).weight += addition


# The whole


class Projector(nn.Module):
    """LLaVA's two-layer projector, which sets off with inputs of mean 0 and spread 1."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    @torch.no_grad()
    def standardize(self, features: Tensor) -> None:
        """Fold mean and spread of ``features`` (n, inputs) into the first matrix."""
        mean, spread = features.mean(0), features.std(0) + 1e-6
        self.linear_1.weight /= spread
        self.linear_1.bias -= self.linear_1.weight @ mean

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """Changes ``tokenizer``: it gets the image token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return LlavaProcessor(
        image_processor=data.image_processor(),
        tokenizer=tokenizer,
        patch_size=data.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(
    backbone: Any, projector: Projector, language_model: LlamaForCausalLM, tokenizer: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """One LLaVA out of its parts, and its processor. Changes ``language_model`` and ``tokenizer``: they get a token."""
    processor = build_processor(tokenizer)
    # The mean of the others, which nothing is drawn for; the model never sees it, nor has a reason to say it.
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = language_model.get_input_embeddings().weight.data
    rows[-1] = rows[:-1].mean(0)
    config = LlavaConfig(
        vision_config=backbone.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=data.NUM_IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=list(data.FEATURE_LAYERS),
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(backbone.state_dict())
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor
