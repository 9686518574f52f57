// Turns tensors into the plain problem description; the last line of defence behind the checks made in Python.
#pragma once

#include "arguments.h"
#include "relevancy_product.h"

namespace fastxai {

// Holds what the problem points into, as long as the problem is used.
struct RelevancyProductArguments {
  Tensor query, key, value, grad_output, logsumexp, row, key_start, key_end, result;
  RelevancyProduct problem;
};

inline RelevancyProductArguments describe(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const Tensor& grad_output, const Tensor& logsumexp, const Tensor& row,
                                          const Tensor& key_start, const Tensor& key_end, double scale) {
  const char* const op = "relevancy_product";
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && grad_output.dim() == 5 && row.dim() == 3,
                  "relevancy_product: expected query (B,H,Sq,d), key (B,Hkv,Sk,d), grad_output (B,N,H,Sq,d), "
                  "row (B,N,Sq)");
  RelevancyProductArguments arguments{with_contiguous_last_axis(query),
                                      with_contiguous_last_axis(key),
                                      with_contiguous_last_axis(value),
                                      with_contiguous_last_axis(grad_output),
                                      with_dense_layout(logsumexp),
                                      with_dense_layout(row),
                                      with_dense_layout(key_start),
                                      with_dense_layout(key_end),
                                      torch::stable::new_empty(row, {row.size(0), row.size(1), key.size(2)}),
                                      {}};
  describe_attention(op, scale, arguments);
  RelevancyProduct& problem = arguments.problem;
  problem.targets = row.size(1);
  problem.grad_targets = grad_output.size(1);
  STD_TORCH_CHECK(problem.grad_targets == problem.targets || problem.grad_targets == 1,
                  "relevancy_product: `grad_output` must hold one gradient per row, or one for all");
  check_shape(op, "row", row, {problem.batch, problem.targets, problem.queries});
  check_dtype(op, "row", row, ScalarType::Float);
  problem.row = arguments.row.const_data_ptr<float>();
  problem.result = arguments.result.mutable_data_ptr<float>();
  return arguments;
}

}  // namespace fastxai
