"""The decoder layers inside a transformers model."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError


def find_decoder_layers(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The language model inside ``model`` and its decoder layers, in order.

    Raises:
        UnsupportedModelError: no list of ``num_hidden_layers`` layers was found, or the model is an encoder-decoder.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{kind} is not a transformers model with a decoder")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; only decoder-only language models can be swept")
    decoder = model.get_decoder()  # type: ignore[operator]
    wanted = decoder.config.get_text_config().num_hidden_layers
    if getattr(decoder.config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers, which the sweep does not follow yet"
        )
    lists = [module for _, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    for layers in lists:
        if len(layers) == wanted:
            return decoder, list(layers)
    raise UnsupportedModelError(f"{kind}: no list of {wanted} decoder layers was found in {type(decoder).__name__}")
