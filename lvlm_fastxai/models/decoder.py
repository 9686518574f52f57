"""The decoder layers inside a transformers model, and the model inside its wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedModelError


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch.compile, PEFT and data parallelism.

    A LoRA adapter lives in the layers of the model that it was put into, so the model inside computes the same.

    Example:
        >>> import torch
        >>> inside = torch.nn.Linear(2, 2)
        >>> unwrap(torch.compile(inside)) is inside
        True
    """
    wrapped = _wrapped(model)
    return model if wrapped is None else unwrap(wrapped)


def _wrapped(model: Any) -> Any:
    """The module that ``model`` is a wrapper of; None if it is none."""
    # Looked up in the module's own table: wrappers hand every other name on to what they wrap.
    own = model._modules
    if "_orig_mod" in own:
        return own["_orig_mod"]
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    if "base_model" in own and hasattr(type(model), "get_base_model"):  # peft.PeftModel
        return model.get_base_model()
    return None


def find_decoder_layers(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Find the language model inside ``model``, wrapped or not, and its decoder layers in order.

    Raises:
        UnsupportedModelError: no list of ``num_hidden_layers`` layers was found, the model is an encoder-decoder, or a
            wrapper computes what the model inside does not (prompt tuning).
    """
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its adapter {name!r} adds positions to the prompt, which a sweep does not "
                "follow; LoRA and other adapters inside the layers are fine"
            )
    model = unwrap(model)
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{kind} is not a transformers model with a decoder")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; only decoder-only language models can be swept")
    decoder = unwrap(model.get_decoder())  # type: ignore[operator]
    text_config: Any = decoder.config.get_text_config()  # type: ignore[union-attr,operator]
    wanted = text_config.num_hidden_layers
    if getattr(text_config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers, which the sweep does not follow yet"
        )
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    for layers in lists:
        if len(layers) == wanted:
            return decoder, list(layers)
    raise UnsupportedModelError(f"{kind}: no list of {wanted} decoder layers was found in {type(decoder).__name__}")
