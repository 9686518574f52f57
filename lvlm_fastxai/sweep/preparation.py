"""A model made ready for a sweep, and put back exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..models.lock import holding
from . import attention


@contextlib.contextmanager
def prepared(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode, its parameters frozen, with our attention in its decoder.

    The model's lock is held in between: another thread that wants the same model waits.
    """
    attention.register()
    with holding(model):
        yield from _prepared(model, decoder)


def _prepared(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    config: Any = decoder.config
    implementation = config._attn_implementation_internal
    training = [module for module in model.modules() if module.training]
    # By name: accelerate puts other parameters in the place of offloaded ones whenever their module runs.
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        for module in training:
            module.training = False
        for module, name in trainable:
            module.get_parameter(name).requires_grad_(False)
        # The decoder's own configuration, not set_attn_implementation: that walks every sub-model and would also reset
        # implementations that a user has set by hand.
        config._attn_implementation_internal = attention.NAME
        yield
    finally:
        config._attn_implementation_internal = implementation
        for module, name in trainable:
            module.get_parameter(name).requires_grad_(True)
        for module in training:
            module.training = True
