"""Tensor parallelism: a model whose attention heads are split over the ranks of a ``torch.distributed`` group.

transformers' plans give each of R ranks H / R query heads and Hkv / R key/value heads of every layer, and all of the
states between the layers; gradients at a layer's input are summed over the ranks. So a sweep runs on every rank as on
one, but for two things. A mean over heads is one over the rank's own: one all-reduce of (B, N, S) per layer makes it
whole. And a number that decides what runs next must be the same to the last bit on all ranks, or they would wait for
each other for ever: the first rank decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

# The projections that give a rank its keys, and so its heads, in transformers' plans.
KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a model's heads.

    Attributes:
        count: R.
        group: their ``torch.distributed`` group; None where one process holds the whole model, at no cost then.
        device: type of the device whose tensors the group can exchange.
    """

    count: int = 1
    group: Any = None
    device: str = "cpu"

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all heads, on every rank, of a mean over this rank's heads; all ranks hold equally many."""
        if self.group is None:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total / self.count

    def agree(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on every rank. Sizes may differ between ranks; dtype and number of axes may not."""
        if self.group is None:
            return tensor
        shape = torch.tensor(tensor.shape, device=self.device)
        torch.distributed.broadcast(shape, group=self.group, group_src=0)
        first = torch.distributed.get_rank(self.group) == 0
        told = tensor.to(self.device).contiguous() if first else tensor.new_empty(shape.tolist(), device=self.device)
        torch.distributed.broadcast(told, group=self.group, group_src=0)
        return told.to(tensor.device)

    def check_heads(self, found: int, whole: int | None) -> None:
        """Refuse a layer that ran ``found`` of ``whole`` heads although no ranks are known to hold the others.

        Raises:
            UnsupportedModelError: the model was split by something that :func:`find_ranks` does not know.
        """
        if not isinstance(whole, int) or found in (whole, whole // self.count):
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UnsupportedModelError(
                f"a decoder layer ran {found} of {whole} heads in this process, and the model does not say which ranks "
                "hold the others; split it with transformers, from_pretrained(..., distributed_config=...)"
            )


def find_ranks(model: nn.Module, config: Any) -> Ranks:
    """The ranks over which transformers has split ``model``.

    Args:
        config: of the language model.

    Raises:
        UnsupportedModelError: heads are split but the ranks' number does not divide theirs.
    """
    count: Any = getattr(model, "_tp_size", None) or 1
    if count == 1:
        return Ranks()
    plan: Any = model.tp_plan or {}
    splits_heads = any(
        rule.endswith(KEY_PROJECTIONS) and style.endswith("colwise")  # "colwise_rep" gives every rank all heads
        for rule, style in plan.items()
    )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if splits_heads and isinstance(heads, int) and heads % count:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its {heads} heads ({name}) cannot be split evenly over {count} ranks"
            )
    mesh: Any = model._device_mesh
    return Ranks(count, mesh.get_group("tp" if mesh.ndim > 1 else None), mesh.device_type)
