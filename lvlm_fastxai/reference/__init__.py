"""Dense twins: the readable definition of every operation, used as the referee in tests and benchmarks."""

from __future__ import annotations

from lvlm_fastxai.reference.attention_backward_relevancy import attention_backward_relevancy
from lvlm_fastxai.reference.glimpse_product import glimpse_product
from lvlm_fastxai.reference.glimpse_statistics import glimpse_statistics
from lvlm_fastxai.reference.proxy_relevancy import proxy_relevancy
from lvlm_fastxai.reference.relevancy_product import relevancy_product

__all__ = [
    "attention_backward_relevancy",
    "glimpse_product",
    "glimpse_statistics",
    "proxy_relevancy",
    "relevancy_product",
]
