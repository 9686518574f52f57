"""A model made ready for a sweep; what is changed is undone by its guard."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.guard import Guard, shielded
from . import attention
from .tape import current_tape


@shielded
def prepare(guard: Guard, model: nn.Module, decoder: nn.Module) -> None:
    """Put the model in evaluation mode, freeze its parameters and set our attention in its decoder.

    Args:
        guard: open; it puts everything back exactly as it was.
        model: all of it, wrappers included.
        decoder: the language model inside, whose configuration chooses the attention.
    """
    attention.register()
    guard.on_close(current_tape.set, current_tape.get())
    for module in model.modules():
        if module.training:
            guard.on_close(setattr, module, "training", True)
            module.training = False
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                guard.on_close(_unfreeze, module, name)
                parameter.requires_grad_(False)
    config: Any = decoder.config
    guard.on_close(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
    # The decoder's own configuration, not set_attn_implementation: that walks every sub-model and would also reset
    # implementations that a user has set by hand.
    config._attn_implementation_internal = attention.NAME


def _unfreeze(module: nn.Module, name: str) -> None:
    # By name: accelerate puts other parameters in the place of offloaded ones whenever their module runs.
    module.get_parameter(name).requires_grad_(True)
