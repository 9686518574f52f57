"""What the processor makes of a prompt, and what of it the model takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import families
from ..errors import ArgumentError, UnknownFamilyError, one_line
from ..models.decoder import unwrap

Inputs = dict[str, Any]

# What tokenizers add of themselves, and many models do not ask for. A family names what else is for the layout alone.
_OF_THE_TOKENIZER = ("token_type_ids", "mm_token_type_ids", "special_tokens_mask", "offset_mapping", "length")


def encode(model: Any, processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Inputs:
    """Processor outputs of B prompts on the model's device, padded on the left so that all end at one column.

    Args:
        model: whose device and dtype they get.
        processor: a transformers processor.
        texts: B prompts, image markers included.
        pictures: of each prompt.

    Raises:
        ArgumentError: the processor cannot prepare them; no image tokens; more positions than the model has.
    """
    first = processor.tokenizer.bos_token
    settings: dict[str, Any] = {}
    # A template that writes the first token itself must not get it twice.
    if first and texts[0].startswith(first):
        settings["add_special_tokens"] = False
    if len(texts) > 1:
        settings |= {"padding": True, "padding_side": "left"}
    # Pictures of several prompts are told apart by nesting, which single prompts do without.
    images = [list(own) for own in pictures] if len(texts) > 1 else list(pictures[0])
    try:
        encoded = processor(images=images, text=list(texts), return_tensors="pt", **settings)
    except Exception as error:  # Processors raise what they like.
        raise ArgumentError(f"the processor cannot prepare image and question: {one_line(error)}") from error
    inputs = to_model(model, encoded)
    _check_image_tokens(model, inputs, pictures)
    _check_length(model, inputs)
    return inputs


def to_model(model: Any, encoded: Mapping[str, Any]) -> Inputs:
    """Tensors on the model's device, those with fractions in its dtype; anything else as it is."""
    device, dtype = model.device, model.dtype
    return {
        name: (value.to(device, dtype) if value.is_floating_point() else value.to(device))
        if isinstance(value, Tensor)
        else value
        for name, value in encoded.items()
    }


def accepted(model: nn.Module, inputs: Mapping[str, Any]) -> Inputs:
    """The inputs that the model's forward takes, whatever is wrapped around it.

    Args:
        model: a transformers model, perhaps within PEFT or ``torch.compile``.
        inputs: what a processor has made, answers perhaps joined to it.

    Raises:
        ArgumentError: an input that the model does not take and that is more than a remark on the layout; image tokens
            in the prompt and no pixels among the inputs.
    """
    inner: Any = unwrap(model)
    names = inspect.signature(inner.forward).parameters
    try:
        layout_alone = families.find(inner.config).layout_inputs
    except UnknownFamilyError:
        layout_alone = ()
    lost = [name for name in inputs if name not in names and name not in (*_OF_THE_TOKENIZER, *layout_alone)]
    if lost:
        raise ArgumentError(
            f"inputs: {type(inner).__name__} takes no {', '.join(map(repr, lost))}, which the processor has made; is "
            "it this model's processor?"
        )
    taken = {name: value for name, value in inputs.items() if name in names}
    _check_pixels(inner, taken)
    return taken


def _check_pixels(model: Any, inputs: Mapping[str, Any]) -> None:
    tokens = inputs.get("input_ids")
    markers = [token for token in families.media_tokens(model.config) if token is not None]
    if not isinstance(tokens, Tensor) or not markers:
        return
    pixels = any(
        isinstance(value, Tensor) and ("pixel" in name or value.is_floating_point()) for name, value in inputs.items()
    )
    if not pixels and bool(torch.isin(tokens, tokens.new_tensor(markers)).any()):
        raise ArgumentError("inputs: the prompt holds image tokens, and no pixels come with it")


def _check_image_tokens(model: Any, inputs: Mapping[str, Any], pictures: Sequence[Sequence[Image.Image]]) -> None:
    token = families.media_tokens(model.config)[0]
    if token is None:
        return
    found = (inputs["input_ids"] == token).any(1).tolist()
    for inside, own in zip(found, pictures, strict=True):
        if not inside:
            raise ArgumentError(
                f"the prompt holds no image token (id {token}) although {len(own)} picture(s) came: the processor's "
                "chat template, or prompt_template, must put the image into the prompt"
            )


def longest(model: Any) -> int | None:
    """Positions that the model was made for, prompt and answer together; None where nobody says."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Positions in three directions: those of a picture's many columns are few.
    if "mrope_section" in rope:
        return None
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _check_length(model: Any, inputs: Mapping[str, Any]) -> None:
    limit, length = longest(model), inputs["input_ids"].shape[1]
    if limit is not None and length >= limit:
        raise ArgumentError(
            f"question: the prompt has {length} positions, and the model {limit}, answer included; shorten the question"
        )
