"""LLaVA-1.5: one square grid from a CLIP, SigLIP or DINOv2 tower."""

from ._family import Family
from ._layouts import SquareGrid

FAMILY = Family(
    model_types=("llava",),
    image_token="image_token_index",
    layout=SquareGrid(strategy="vision_feature_select_strategy", class_token_towers=("clip_vision_model", "dinov2")),
)
