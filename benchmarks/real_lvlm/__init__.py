"""A real LVLM, made offline out of DINOv2-small and SmolLM2: ``python -m benchmarks real-lvlm``."""

from ..common.machine import ROOT

FOLDER = ROOT / ".cache" / "real-lvlm"
