"""Where image tokens stand in the prompt, per model family: data, no model is ever run.

A family is one file in this package that defines `FAMILY = Family(model_types, image_token, layout)`; it is found by
itself. Layout rules live in `_layouts`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import LongTensor, Tensor

from ..errors import ArgumentError, UnknownFamilyError
from ._family import Family
from ._layouts import Box, ImageLayout, Part, Prompt, attribute

__all__ = ["Box", "Family", "ImageLayout", "Part", "find", "image_layouts", "known", "media_tokens", "prompt_columns"]


@cache
def known() -> Mapping[str, Family]:
    """Every known family by `config.model_type`."""
    families = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        families.update(dict.fromkeys(family.model_types, family))
    return families


def find(config: Any) -> Family:
    """The family of a model configuration.

    Args:
        config: a transformers configuration, `model.config`.

    Raises:
        UnknownFamilyError: no file of this package covers `config.model_type`; the message names the missing data.
    """
    model_type = getattr(config, "model_type", None)
    family = known().get(str(model_type))
    if family is not None:
        return family
    token = next((name for name in ("image_token_id", "image_token_index") if hasattr(config, name)), None)
    raise UnknownFamilyError(
        f"model type {model_type!r} has no image grid here (known: {', '.join(sorted(known()))}). Missing are "
        f"(1) the image token id: the configuration attribute that holds it "
        f"({f'probably {token!r}' if token else 'none of the usual names is there'}), "
        f"(2) the patch grid: a layout rule of lvlm_fastxai/families/_layouts and its parameters. Add both as "
        f"lvlm_fastxai/families/{str(model_type).replace('-', '_')}.py: "
        f"FAMILY = Family(model_types=({model_type!r},), image_token=…, layout=…)"
    )


def media_tokens(config: Any) -> list[int | None]:
    """Ids of the tokens that stand for image (first) and other features; None where the configuration does not say.

    Of an unknown family, what the configuration calls image token.
    """
    try:
        family = find(config)
        names: tuple[str, ...] = (family.image_token, *family.other_tokens)
    except UnknownFamilyError:
        names = ("image_token_id" if hasattr(config, "image_token_id") else "image_token_index",)
    return [getattr(config, name, None) for name in names]


def image_layouts(
    config: Any,
    inputs: Mapping[str, Any],
    sample: int = 0,
    *,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    image_processor: Any = None,
) -> list[ImageLayout]:
    """Where each picture of one sample stands in the sequence.

    Args:
        config: a transformers configuration, `model.config`.
        inputs: processor outputs of the batch, as given to the model: input_ids (B, S) and, depending on the family,
            pixel_values, image_grid_thw, image_sizes, batch_num_images, rows and cols, num_crops.
        sample: index of the sample in the batch.
        image_sizes: (height, width) in pixels of the sample's original pictures. Makes boxes exact where the processor
            crops or pads (needs `image_processor` too) and settles arrangements of tiles that are otherwise read off
            the pixels.
        image_processor: the processor's `image_processor`.

    Returns:
        One layout per picture, in the order of the prompt; empty for a text-only model or prompt.

    Raises:
        UnknownFamilyError: see `find`.
        ArgumentError: the inputs do not fit the prompt's number of image tokens, or lack what the family needs.
    """
    if not _has_vision(config):
        return []
    family = find(config)
    tokens = _tokens(inputs, sample)
    image_token = int(attribute(config, family.image_token))
    return family.layout.layouts(
        Prompt(
            config=config,
            inputs=inputs,
            sample=sample,
            tokens=tokens,
            image_columns=tuple(np.flatnonzero(row == image_token) for row in tokens),
            image_sizes=None if image_sizes is None else tuple((int(h), int(w)) for h, w in image_sizes),
            image_processor=image_processor,
        )
    )


def prompt_columns(config: Any, inputs: Mapping[str, Any], sample: int, prompt_length: int) -> LongTensor:
    """The columns of the prompt that hold text: neither image (or video) features nor padding.

    Args:
        config: a transformers configuration, `model.config`.
        inputs: input_ids (B, S) and, with padding, attention_mask (B, S).
        sample: index of the sample in the batch.
        prompt_length: number of columns before the answer, padding included.

    Returns:
        (T,) int64 tensor on the CPU, ascending.

    Raises:
        UnknownFamilyError: see `find`.
        ArgumentError: prompt_length is not in 1..S or input_ids are missing.
    """
    row = _tokens(inputs, sample)[sample]
    if not 0 < prompt_length <= len(row):
        raise ArgumentError(f"prompt_length: expected 1 … {len(row)}, got {prompt_length}")
    keep = np.arange(len(row)) < prompt_length
    mask = inputs.get("attention_mask")
    if mask is not None:
        keep &= torch.as_tensor(mask)[sample].cpu().numpy().astype(bool)
    if _has_vision(config):
        family = find(config)
        for name in (family.image_token, *family.other_tokens):
            keep &= row != int(attribute(config, name))
    return torch.from_numpy(np.flatnonzero(keep))  # type: ignore[return-value]


def _has_vision(config: Any) -> bool:
    return getattr(config, "vision_config", None) is not None or str(getattr(config, "model_type", "")) in known()


def _tokens(inputs: Mapping[str, Any], sample: int) -> np.ndarray:
    tokens = inputs.get("input_ids")
    if tokens is None:
        raise ArgumentError("inputs: 'input_ids' are needed to find the image tokens")
    tokens = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if tokens.ndim != 2:
        raise ArgumentError(f"inputs: expected input_ids of shape (B, S), got {tokens.shape}")
    if not 0 <= sample < len(tokens):
        raise ArgumentError(f"sample: expected 0 … {len(tokens) - 1}, got {sample}")
    return tokens
