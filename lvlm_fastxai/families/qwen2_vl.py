"""Qwen2-VL: pictures at their own resolution, 2 × 2 patches merged."""

from ._family import Family
from ._layouts import MergedGrid

FAMILY = Family(
    model_types=("qwen2_vl",),
    image_token="image_token_id",
    layout=MergedGrid(),
    other_tokens=("video_token_id",),
)
