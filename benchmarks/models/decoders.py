"""Decoders of random weights in the shapes of real models, and the logits that are explained in them.

A case is one entry of :data:`CASES`: what the commands `end-to-end` and `glimpse` can run. Those of 7B models, which
take a GPU, stand in `benchmarks.gpu.end_to_end`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Target = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A decoder and a sequence; the prompt is given as embeddings, as a vision tower's output would be."""

    layers: int
    width: int
    heads: int
    key_heads: int
    intermediate: int
    columns: int
    targets: int = 1
    dtype: str = "float32"
    architecture: str = "Llama"
    vocabulary: int = 32000


CASES = {
    # The shape of the acceptance test: an eight-layer decoder at LLaVA-1.5's 576 image tokens + 128 of text.
    "decoder-704": Case(8, 1024, 16, 16, 2816, 704),
    # In the dtype of a GPU: how many (S, width) tensors a layer keeps carries over to a 7B model.
    "decoder-704-bf16": Case(8, 1024, 16, 16, 2816, 704, dtype="bfloat16"),
    "decoder-2048": Case(8, 1024, 16, 16, 2816, 2048),
    "decoder-4096": Case(8, 1024, 16, 16, 2816, 4096),
    "decoder-704-16-targets": Case(8, 1024, 16, 16, 2816, 704, targets=16),
    # SmolLM2-135M's decoder (the language model of SmolVLM-256M): many layers, grouped heads.
    "smollm2-135m-1024": Case(30, 576, 9, 3, 1536, 1024),
}


def build(case: Case, device: str) -> tuple[Any, dict[str, Any], list[Target]]:
    """Make a random model of the case's shape, its inputs and the explained logits."""
    import torch

    torch.manual_seed(0)
    model = build_model(case, device)
    return model, *build_inputs(case, device)


def build_model(case: Case, device: str) -> Any:
    """Make a random decoder on the device, in its dtype: a 7B model takes its 13 GiB there and nothing on the host."""
    import torch
    import transformers

    config = getattr(transformers, f"{case.architecture}Config")(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        max_position_embeddings=max(32768, case.columns),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        with torch.device(device):
            model = getattr(transformers, f"{case.architecture}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def build_inputs(case: Case, device: str) -> tuple[dict[str, Any], list[Target]]:
    """Draw embeddings, and choose one logit of each of the last positions."""
    import torch

    embeddings = torch.randn(1, case.columns, case.width, device=device, dtype=getattr(torch, case.dtype))
    rows = [case.columns - 1 - index for index in range(case.targets)]
    return {"inputs_embeds": embeddings}, [(0, row, (7 + row) % case.vocabulary) for row in rows]
