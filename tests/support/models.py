"""Tiny random models of every family, and inputs as the real processors shape them (no tokenizer, no downloads)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

VOCABULARY = 89
PAD, BOS = 0, 1
TEXT = range(2, 56)
NEWLINE, FAKE, OVERVIEW, BOI, EOI, VISION_START, VISION_END, VIDEO, IMAGE = range(VOCABULARY - 9, VOCABULARY)
TILE_TAGS = range(56, VOCABULARY - 9)
ANSWER = 6
"""Number of answer tokens that end every sample."""

WIDTH, HEADS, KEY_VALUE_HEADS = 32, 4, 2
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
Inputs = dict[str, Any]


def text_config(layers: int, **extra: Any) -> Inputs:
    """Decoder of `layers` layers, 4 query and 2 key/value heads of width 8."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        **extra,
    }


def tower_config(model_type: str, image_size: int, patch_size: int, **extra: Any) -> Inputs:
    """Two-layer vision tower."""
    return {
        "model_type": model_type,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        **extra,
    }


def image_processor(name: str, **settings: Any) -> Any:
    """The real image processor in the version that works on PIL alone (its name changed within transformers 5)."""
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return found(**settings)


def _square(tokens: int, prepared: Inputs) -> list[int]:
    return [IMAGE] * tokens


def _between(start: int, end: int) -> Callable[[int, Inputs], list[int]]:
    return lambda tokens, prepared: [start] + [IMAGE] * tokens + [end]


def _views(tokens: int, prepared: Inputs) -> list[int]:
    views = len(prepared["pixel_values"])
    one = [NEWLINE, BOI] + [IMAGE] * (tokens // views) + [EOI, NEWLINE]
    # "Here is the original image … and here are some crops to help you see better …"
    return [TEXT[3], *one, TEXT[4], TEXT[5], *one * (views - 1)] if views > 1 else one


def _tiles(tokens: int, prepared: Inputs) -> list[int]:
    rows, across = prepared["rows"][0][0], prepared["cols"][0][0]
    tile = [IMAGE] * (tokens // (rows * across + 1))
    ids = []
    for row in range(rows):
        for column in range(across):
            ids += [FAKE, TILE_TAGS[4 * row + column], *tile]
        ids.append(NEWLINE)
    return ids + [NEWLINE] * bool(rows) + [FAKE, OVERVIEW, *tile, FAKE]


@dataclass(frozen=True)
class Recipe:
    """How a family's tiny model and its inputs are made.

    config(layers) → configuration; processor and its settings; the default picture's (height, width); ids(tokens,
    processor output) → the prompt's ids for one picture.
    """

    model: str
    config: str
    settings: Callable[[int], Inputs]
    processor: str
    processor_settings: Inputs
    picture: tuple[int, int]
    ids: Callable[[int, Inputs], list[int]] = _square
    layers: int = 3


CLIP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
TILES = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
PATCHES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}


def _llava(tower: str, strategy: str) -> Callable[[int], Inputs]:
    return lambda layers: {
        "vision_config": tower_config(tower, 32, 8),
        "text_config": {"model_type": "llama", **text_config(layers)},
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": strategy,
    }


def _any_resolution(tower: str, strategy: str, text: str, **extra: Any) -> Callable[[int], Inputs]:
    return lambda layers: {
        "vision_config": tower_config(tower, 16, 4),
        "text_config": {"model_type": text, **text_config(layers)},
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": strategy,
        "image_grid_pinpoints": PINPOINTS,
        **extra,
    }


def _qwen(**tower: Any) -> Callable[[int], Inputs]:
    return lambda layers: {
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **tower,
        },
        "text_config": text_config(layers, rope_parameters=dict(MROPE)),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def _tiled(kind: str) -> Callable[[int], Inputs]:
    return lambda layers: {
        "vision_config": tower_config(f"{kind}_vision", 16, 4),
        "text_config": {"model_type": "llama", **text_config(layers)},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    }


RECIPES = {
    "llama": Recipe("LlamaForCausalLM", "LlamaConfig", text_config, "", {}, (0, 0)),
    "llava": Recipe(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        _llava("clip_vision_model", "default"),
        "CLIPImageProcessor",
        CLIP,
        (40, 40),
    ),
    "llava_siglip": Recipe(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        _llava("siglip_vision_model", "full"),
        "SiglipImageProcessor",
        {"size": {"height": 32, "width": 32}},
        (30, 50),
    ),
    "llava_dinov2": Recipe(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        _llava("dinov2", "default"),
        "CLIPImageProcessor",
        CLIP,
        (40, 40),
    ),
    "llava_next": Recipe(
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        _any_resolution("clip_vision_model", "default", "llama"),
        "LlavaNextImageProcessor",
        {
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "image_grid_pinpoints": PINPOINTS,
        },
        (20, 50),
    ),
    "llava_onevision": Recipe(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        _any_resolution("siglip_vision_model", "full", "qwen2", video_token_index=VIDEO),
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 16, "width": 16}, "image_grid_pinpoints": PINPOINTS},
        (44, 22),
    ),
    "qwen2_vl": Recipe(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        _qwen(embed_dim=16, hidden_size=WIDTH, mlp_ratio=2),
        "Qwen2VLImageProcessor",
        PATCHES,
        (24, 40),
        _between(VISION_START, VISION_END),
    ),
    "qwen2_5_vl": Recipe(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        _qwen(hidden_size=16, intermediate_size=32, out_hidden_size=WIDTH, window_size=16, fullatt_block_indexes=[1]),
        "Qwen2VLImageProcessor",
        PATCHES,
        (56, 24),
        _between(VISION_START, VISION_END),
    ),
    "qwen3_vl": Recipe(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        _qwen(
            hidden_size=16,
            intermediate_size=32,
            out_hidden_size=WIDTH,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        "Qwen2VLImageProcessor",
        PATCHES,
        (32, 48),
        _between(VISION_START, VISION_END),
    ),
    "idefics3": Recipe(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        _tiled("idefics3"),
        "Idefics3ImageProcessor",
        TILES,
        (30, 45),
        _tiles,
    ),
    "smolvlm": Recipe(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        _tiled("smolvlm"),
        "SmolVLMImageProcessor",
        TILES,
        (45, 30),
        _tiles,
    ),
    "paligemma": Recipe(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        lambda layers: {
            "vision_config": tower_config("siglip_vision_model", 16, 4, projection_dim=WIDTH, vision_use_head=False),
            "text_config": {"model_type": "gemma", **text_config(layers)},
            "image_token_index": IMAGE,
            "projection_dim": WIDTH,
        },
        "SiglipImageProcessor",
        {"size": {"height": 16, "width": 16}},
        (30, 50),
    ),
    "gemma3": Recipe(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        lambda layers: {
            "vision_config": tower_config("siglip_vision_model", 16, 2, vision_use_head=False),
            "text_config": text_config(
                layers,
                query_pre_attn_scalar=WIDTH // HEADS,
                sliding_window=10,
                layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
            ),
            "image_token_index": IMAGE,
            "boi_token_index": BOI,
            "eoi_token_index": EOI,
            "mm_tokens_per_image": 16,
        },
        "Gemma3ImageProcessor",
        {"size": {"height": 16, "width": 16}},
        (30, 50),
        _views,
    ),
    "internvl": Recipe(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        lambda layers: {
            "vision_config": tower_config("internvl_vision", 16, 4),
            "text_config": {"model_type": "qwen2", **text_config(layers)},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        },
        "GotOcr2ImageProcessor",
        {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "max_patches": 6},
        (30, 45),
        _between(BOI, EOI),
    ),
}

# The tower is all that tells LLaVA with DINOv2 from LLaVA, and only layouts look at it.
NAMES = tuple(name for name in RECIPES if name != "llava_dinov2")
VISION_NAMES = tuple(name for name in NAMES if name != "llama")


def make_model(name: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, layers: int | None = None) -> nn.Module:
    """The family's tiny model in eval mode, every weight redrawn so that no layer is degenerate."""
    recipe = RECIPES[name]
    config = getattr(transformers, recipe.config)(**recipe.settings(layers or recipe.layers))
    model = getattr(transformers, recipe.model)(config).eval().to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in path and parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            elif ("embed" in path and parameter.dim() == 2) or "position" in path:
                parameter.copy_(0.5 * noise)
            elif path.endswith("mm_input_projection_weight"):  # stored (in, out)
                parameter.copy_(noise / parameter.shape[0] ** 0.5)
            else:
                parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)
    return model.to(dtype)


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random picture of (height, width) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepare(name: str, image: Image.Image, **settings: Any) -> Inputs:
    """What the real image processor makes of one picture, tensors with a leading batch or patch dimension."""
    recipe = RECIPES[name]
    processor = image_processor(recipe.processor, **{**recipe.processor_settings, **settings})
    if name in ("idefics3", "smolvlm"):
        return dict(processor([[image]], return_tensors="pt", return_row_col_info=True))
    return dict(processor([image], return_tensors="pt"))


def count_features(model: nn.Module, prepared: Inputs) -> int:
    """Number of embeddings the model itself makes of the prepared picture."""
    accepted = inspect.signature(model.get_image_features).parameters
    given = {key: value for key, value in prepared.items() if key in accepted}
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    with torch.no_grad():
        features = model.get_image_features(**given)
    features = getattr(features, "pooler_output", features)
    return _rows(features[0] if isinstance(features, tuple) and not isinstance(features[0], Tensor) else features)


def _rows(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.numel() // WIDTH
    return sum(_rows(feature) for feature in features)


def make_sample(
    name: str,
    model: nn.Module,
    *,
    seed: int = 0,
    text: int = 12,
    images: Sequence[Image.Image] | None = None,
    **settings: Any,
) -> Inputs:
    """One unpadded sample: a word or two, the pictures, `text` question tokens, `ANSWER` answer tokens."""
    recipe = RECIPES[name]
    generator = torch.Generator().manual_seed(1000 + seed)

    def words(n: int) -> list[int]:
        return torch.randint(TEXT[0], TEXT[-1] + 1, (n,), generator=generator).tolist()

    if images is None:
        images = [] if name == "llama" else [picture(recipe.picture, seed)]
    ids = [BOS] if name != "paligemma" else []
    vision: list[Inputs] = []
    for image in images:
        prepared = prepare(name, image, **settings)
        ids += ([] if name == "paligemma" else words(2)) + recipe.ids(count_features(model, prepared), prepared)
        vision.append(prepared)
    ids += ([BOS] if name == "paligemma" else []) + words(text + ANSWER)
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    is_image = (input_ids == IMAGE).long()
    if name == "paligemma":
        inputs["token_type_ids"] = (torch.arange(len(ids)) >= len(ids) - ANSWER).long()[None]
    elif name == "gemma3":
        inputs["token_type_ids"] = is_image
    elif name.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_image
    accepted = inspect.signature(model.forward).parameters
    inputs.update(_stack(vision))
    if name in ("idefics3", "smolvlm") and len(images) > 1:
        inputs["pixel_values"] = torch.cat([p["pixel_values"] for p in vision], dim=1)
        inputs["pixel_attention_mask"] = torch.cat([p["pixel_attention_mask"] for p in vision], dim=1)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {key: value for key, value in inputs.items() if key in accepted}


def _stack(parts: Sequence[Inputs]) -> Inputs:
    """Concatenate vision inputs along the first dimension, filling missing tiles with zeros."""
    joined = {}
    for key in parts[0] if parts else ():
        tensors = [part[key] for part in parts]
        if not isinstance(tensors[0], Tensor):
            continue
        if tensors[0].dim() >= 4 and len({tensor.shape[1:] for tensor in tensors}) > 1:
            tiles = max(tensor.shape[1] for tensor in tensors)
            tensors = [
                torch.cat([t, t.new_zeros(t.shape[0], tiles - t.shape[1], *t.shape[2:])], dim=1) for t in tensors
            ]
        joined[key] = torch.cat(tensors)
    return joined


SEQUENCE_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def join(name: str, samples: Sequence[Inputs], side: str, length: int = 0) -> Inputs:
    """One batch of single samples, padded on `side` ("left" or "right") to the longest or to `length` columns.

    Positions are passed as `generate` would (counted without padding), except for the Qwen models, which do it.
    """
    length = max(length, *(sample["input_ids"].shape[1] for sample in samples))
    joined = _stack([{key: v for key, v in sample.items() if key not in SEQUENCE_KEYS} for sample in samples])
    for key in SEQUENCE_KEYS:
        if key not in samples[0]:
            continue
        rows = []
        for sample in samples:
            row = sample[key][0]
            filler = row.new_full((length - len(row),), PAD if key == "input_ids" else 0)
            rows.append(torch.cat([filler, row] if side == "left" else [row, filler]))
        joined[key] = torch.stack(rows)
    if not name.startswith("qwen"):
        positions = (joined["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        joined["position_ids"] = positions + (1 if name == "paligemma" else 0)
    return joined


def build(
    name: str,
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    layers: int | None = None,
    batch: int = 1,
    padding: str | None = None,
    text: int = 12,
    **sample: Any,
) -> tuple[nn.Module, Inputs]:
    """Tiny model and inputs; samples of a batch have different pictures and, where padded, different lengths.

    Args:
        name: one of `NAMES`.
        dtype: of weights and pixels.
        seed: of weights, pictures and text.
        layers: decoder layers, default 3.
        batch: number of samples.
        padding: "left" or "right"; needed where batch > 1.
        text: question tokens of the first sample; each further one has 5 more.
        sample: see `make_sample`.
    """
    model = make_model(name, dtype, seed=seed, layers=layers)
    samples = [make_sample(name, model, seed=seed + 10 * i, text=text + 5 * i, **sample) for i in range(batch)]
    if batch == 1 and padding is None:
        return model, samples[0]
    return model, join(name, samples, padding or "right")


def answer_targets(inputs: Inputs, sample: int, count: int = ANSWER) -> list[tuple[int, int, int]]:
    """(sample, query row, token id) of the sample's last `count` tokens."""
    columns = inputs["attention_mask"][sample].nonzero()[-count:, 0].tolist()
    return [(sample, column - 1, int(inputs["input_ids"][sample, column])) for column in columns]
