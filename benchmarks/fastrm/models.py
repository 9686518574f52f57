"""What `fastrm` measures on: a LLaVA of random weights, and an untrained head."""

from __future__ import annotations

from typing import Any

from ..models.decoders import CASES

IMAGE, TEXT = 576, 128
IMAGE_TOKEN = 31999
CASE = "decoder-704"


def build_llava(dtype: str = "float32") -> Any:
    """Make a LLaVA of random weights: the acceptance case's decoder under a tower of two layers."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    case = CASES[CASE]
    text = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
    )
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).to(getattr(torch, dtype)).eval()


def new_head(model: Any) -> Any:
    """Make an untrained head for the model, of the shape that ships."""
    from lvlm_fastxai.fastrm import FastRM, FastRMConfig
    from lvlm_fastxai.models.fingerprint import fingerprint

    shipped = FastRM.from_pretrained("shipped").config
    width = model.config.get_text_config().hidden_size
    config = FastRMConfig(
        hidden_size=width,
        layer=-1,
        dim=shipped.dim,
        query_width=shipped.query_width,
        norm=shipped.norm,
        model_fingerprint=fingerprint(model),
    )
    return FastRM(config).eval()
