"""Operators: contract, argument checks and choice of backend. No operator knows of any model."""

from __future__ import annotations

from lvlm_fastxai.ops._dispatch import BACKENDS, backends, chosen_backend, operators, use_backend
from lvlm_fastxai.ops.attention_backward_relevancy import attention_backward_relevancy
from lvlm_fastxai.ops.glimpse_product import glimpse_product
from lvlm_fastxai.ops.glimpse_statistics import glimpse_statistics
from lvlm_fastxai.ops.key_ranges import key_ranges
from lvlm_fastxai.ops.proxy_relevancy import proxy_relevancy
from lvlm_fastxai.ops.relevancy_product import relevancy_product

__all__ = [
    "BACKENDS",
    "attention_backward_relevancy",
    "backends",
    "chosen_backend",
    "glimpse_product",
    "glimpse_statistics",
    "key_ranges",
    "operators",
    "proxy_relevancy",
    "relevancy_product",
    "use_backend",
]
