"""SmolLM2 with low-rank adapters, on packed questions about pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaModel

from .packing import Packed, packed_attention


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
        """Compute what to add to each of the matrices."""
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
        """Compute (A, vocabulary) logits of the answers' tokens. ``image_tokens``: (B x patches, width)."""
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
