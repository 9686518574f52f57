#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lvlm_fastxai, m) {
  m.def(
      "relevancy_product(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor row, "
      "Tensor key_start, Tensor key_end, float scale) -> Tensor");
  m.def(
      "attention_backward_relevancy(Tensor query, Tensor key, Tensor value, Tensor output, Tensor grad_output, "
      "Tensor logsumexp, Tensor row, Tensor key_start, Tensor key_end, float scale) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "glimpse_statistics(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, "
      "Tensor key_start, Tensor key_end, Tensor sum_start, Tensor sum_end, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "proxy_relevancy(Tensor hidden, Tensor query, Tensor offset, Tensor lengths, float eps, bool centered, "
      "bool softmax) -> (Tensor, Tensor, Tensor)");
}
