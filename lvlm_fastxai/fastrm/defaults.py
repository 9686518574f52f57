"""What ``lvlm-fastxai fastrm build-maps`` offers, and what it does unless it is told otherwise."""

from __future__ import annotations

from ..methods.registry import names

METHODS = names(lambda traits: traits.stored_by_build_maps)
ANSWERS = ("model", "reference")
BATCH, SHARD_SIZE, MAX_NEW_TOKENS = 32, 32, 32  # a shard is a batch: what a crash loses
