// CPU entry point of the toy operator.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../common/arguments.h"

namespace fastxai::cpu {
namespace {

Tensor softplus_product(Tensor rows, Tensor weight, double beta) {
  const char* const op = "softplus_product";
  STD_TORCH_CHECK(rows.dim() == 2, op, ": `rows` must have shape (M, I)");
  check_shape(op, "weight", weight, {rows.size(1)});
  check_dtype(op, "rows", rows, ScalarType::Float);
  check_dtype(op, "weight", weight, ScalarType::Float);
  const Tensor left = with_dense_layout(rows), right = with_dense_layout(weight);
  const Tensor result = torch::stable::new_empty(rows, {rows.size(0)});
  const float* a = left.const_data_ptr<float>();
  const float* b = right.const_data_ptr<float>();
  float* found = result.mutable_data_ptr<float>();
  const int64_t width = rows.size(1);
  for (int64_t m = 0; m < rows.size(0); ++m) {
    float product = 0.0f;
    for (int64_t i = 0; i < width; ++i) product += a[m * width + i] * b[i];
    found[m] = static_cast<float>(std::log1p(std::exp(beta * product)) / beta);
  }
  return result;
}

}  // namespace
}  // namespace fastxai::cpu

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CPU, m) {
  m.impl("softplus_product", TORCH_BOX(&fastxai::cpu::softplus_product));
}
