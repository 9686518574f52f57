"""What an evaluation compares, and how much of it, unless it is told otherwise."""

from __future__ import annotations

from ..methods import registry

# What no user would explain with: an older method, an answer explained with an untrained model, and noise as the floor.
BASELINES = ("gradient_input", "chefer_untrained", "random")
METHODS = (*registry.names(lambda traits: traits.sweeps), *BASELINES)
SCENES, CURVES, DESCRIPTIONS = 100, 60, 200
