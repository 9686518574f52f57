"""A model as a whole: loaded, told from others, prepared for a sweep and put back."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "tiny" / "weights"
"""Folder of the shipped LVLM's checkpoint, in the layout ``from_pretrained`` reads."""
