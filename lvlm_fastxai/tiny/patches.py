"""What lies under each patch: a teacher of the vision tower, thrown away after training."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from . import scenes
from .data import GRID, IGNORE, LABEL_NAMES, LABEL_VALUES, Pool


class PatchHeads(nn.Module):
    """Linear read-outs of a patch state: presence, attributes, the object's centre. Not part of the shipped model.

    The centre is asked for twice, from the patch and from the middle of the picture: without the second the tower has
    no reason to keep where a patch is, and questions about places and sides are learnt late.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(LABEL_VALUES[name]) for name in LABEL_NAMES]
        self.linear = nn.Linear(width, sum(self.sizes) + 5)

    def forward(self, states: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Read the patch states (B, P, width).

        Returns:
            Logits of each label name, and (B, P, 5): centre logit, then the object's centre as seen from the patch and
            from the middle of the picture, x and y in units of 32 canvas pixels.
        """
        out = self.linear(states.float())
        return list(out[..., :-5].split(self.sizes, dim=-1)), out[..., -5:]


def patch_loss(
    heads: PatchHeads, states: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor, centers: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Give the loss of the patch read-outs, and the share of labelled patches that each gets right.

    Args:
        heads: the read-outs.
        states: (B, P, width).
        labels: (B, P, 5) int64; offsets: (B, P, 2) fp32, canvas pixels; centers: (B, P) fp32.
    """
    logits, geometry = heads(states)
    loss = states.new_zeros((), dtype=torch.float32)
    accuracy = {}
    for index, name in enumerate(LABEL_NAMES):
        known = labels[..., index] != IGNORE
        if known.any():
            scores, truth = logits[index][known], labels[..., index][known]
            loss = loss + nn.functional.cross_entropy(scores, truth)
            accuracy[name] = float((scores.argmax(-1) == truth).float().mean())
    owned = labels[..., 0] == 1
    side = scenes.CANVAS / GRID
    middle = (torch.arange(GRID) + 0.5) * side - scenes.CANVAS / 2
    patches = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).flatten(0, 1)  # (P, 2), x then y
    places = torch.cat([offsets, offsets + patches], -1) / 32.0
    loss = loss + 2 * nn.functional.smooth_l1_loss(geometry[..., 1:][owned], places[owned])
    hit = nn.functional.binary_cross_entropy_with_logits(geometry[..., 0], centers, pos_weight=torch.tensor(5.0))
    return loss + hit, accuracy


def patch_targets(pool: Pool, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take labels, offsets and centres of the pictures ``rows`` with the grid flattened, as `patch_loss` reads them."""
    return (
        torch.from_numpy(pool.labels[rows].astype(np.int64)).flatten(1, 2),
        torch.from_numpy(pool.offsets[rows].astype(np.float32)).flatten(1, 2),
        torch.from_numpy(pool.centers[rows].astype(np.float32)).flatten(1, 2),
    )
