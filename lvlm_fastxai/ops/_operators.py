"""The one list of operators: a line for each. CMakeLists.txt reads these lines; Python reads `ops.catalogue()`."""

from lvlm_fastxai.ops.attention_backward_relevancy import attention_backward_relevancy as attention_backward_relevancy
from lvlm_fastxai.ops.glimpse_product import glimpse_product as glimpse_product
from lvlm_fastxai.ops.glimpse_statistics import glimpse_statistics as glimpse_statistics
from lvlm_fastxai.ops.proxy_relevancy import proxy_relevancy as proxy_relevancy
from lvlm_fastxai.ops.relevancy_product import relevancy_product as relevancy_product
