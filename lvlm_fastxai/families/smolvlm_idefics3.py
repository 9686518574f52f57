"""Idefics3 and SmolVLM: rows and columns of tiles, then an overview."""

from ._family import Family
from ._layouts import TilesWithOverview

FAMILY = Family(
    model_types=("idefics3", "smolvlm"),
    image_token="image_token_id",
    layout=TilesWithOverview(),
    layout_inputs=("rows", "cols", "video_metadata"),
)
