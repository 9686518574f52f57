"""What of a model an explanation could leave changed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an explanation could leave changed."""
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "dtype": [parameter.dtype for parameter in model.parameters()],
        "data": [parameter.data_ptr() for parameter in model.parameters()],
        "hooks": [
            (dict(module._forward_hooks), dict(module._forward_pre_hooks), dict(module._backward_hooks))
            for module in model.modules()
        ],
        "attention": [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        "config": model.config.to_dict(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        if name == "grad":
            for old, new in zip(value, after[name], strict=True):
                assert (old is None) == (new is None)
                assert old is None or torch.equal(old, new)
        else:
            assert value == after[name], name


def put_to_use(model: nn.Module) -> None:
    """Leave the model as in the middle of its owner's work: partly frozen, in training mode, with gradients."""
    model.train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        if index % 3 == 2:
            parameter.grad = torch.ones_like(parameter)
    next(model.children()).eval()


def in_two_threads(run: Callable[[int], None]) -> None:
    """``run(0)`` and ``run(1)`` at once; an exception in either is raised here."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))


class Stop(BaseException):
    """Stands for any exception a user's code or Ctrl-C may raise."""
