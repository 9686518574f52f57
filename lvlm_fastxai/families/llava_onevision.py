"""LLaVA-OneVision: as LLaVA-NeXT, with an upper bound on the grid and untiled pictures where there are several."""

from ._family import Family
from ._layouts import AnyResolution

FAMILY = Family(
    model_types=("llava_onevision",),
    image_token="image_token_index",
    layout=AnyResolution(most_tiles="vision_aspect_ratio", pictures_per_sample="batch_num_images"),
    other_tokens=("video_token_index",),
)
