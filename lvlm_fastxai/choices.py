"""The closed choices of the public functions, for type checkers and for the command line. Nothing is imported for them.

Methods are named in :mod:`lvlm_fastxai.methods.registry`, the choices of one method beside it.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["Activation", "BackendName", "DType", "Memory", "Norm", "RowTolerance", "Weighting"]

# What the forward keeps: activations; layer inputs; layer inputs, off the device.
Memory = Literal["fast", "lean", "min"]
# Share of gradient and relevancy that a layer may leave out; "auto": what the rounding of the dtype hides.
RowTolerance = float | Literal["auto"]
# Which implementation of an operator runs.
BackendName = Literal["cuda", "triton", "cpu", "reference"]
# Of weights and computation; "auto": as stored in the checkpoint.
DType = Literal["auto", "float32", "bfloat16", "float16"]
# Of a FastRM head.
Norm = Literal["rms", "layer"]
Activation = Literal["sigmoid", "softmax"]
# What a token counts for in the map of the whole answer.
Weighting = Literal["glimpse", "confidence", "prompt", "uniform"]
