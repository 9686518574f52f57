"""Overlay pictures and the self-contained HTML page of an explanation."""

from __future__ import annotations

from .overlays import overlay, overlay_names, write_overlays
from .page import render_html, theme

__all__ = ["overlay", "overlay_names", "render_html", "theme", "write_overlays"]
