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
  RelevancyProduct& problem = arguments.problem;
  problem.element = element_of(op, query);
  problem.batch = query.size(0);
  problem.heads = query.size(1);
  problem.queries = query.size(2);
  problem.width = query.size(3);
  problem.key_heads = key.size(1);
  problem.keys = key.size(2);
  problem.targets = row.size(1);
  problem.grad_targets = grad_output.size(1);
  problem.scale = static_cast<float>(scale);

  STD_TORCH_CHECK(problem.key_heads > 0 && problem.heads % problem.key_heads == 0,
                  "relevancy_product: the key heads must divide the query heads");
  STD_TORCH_CHECK(problem.grad_targets == problem.targets || problem.grad_targets == 1,
                  "relevancy_product: `grad_output` must hold one gradient per row, or one for all");
  check_shape(op, "key", key, {problem.batch, problem.key_heads, problem.keys, problem.width});
  check_shape(op, "value", value, {problem.batch, problem.key_heads, problem.keys, problem.width});
  check_shape(op, "grad_output", grad_output,
              {problem.batch, problem.grad_targets, problem.heads, problem.queries, problem.width});
  check_shape(op, "logsumexp", logsumexp, {problem.batch, problem.heads, problem.queries});
  check_shape(op, "row", row, {problem.batch, problem.targets, problem.queries});
  check_shape(op, "key_start", key_start, {problem.batch, problem.queries});
  check_shape(op, "key_end", key_end, {problem.batch, problem.queries});
  check_dtype(op, "key", key, query.scalar_type());
  check_dtype(op, "value", value, query.scalar_type());
  check_dtype(op, "grad_output", grad_output, query.scalar_type());
  check_dtype(op, "logsumexp", logsumexp, ScalarType::Float);
  check_dtype(op, "row", row, ScalarType::Float);
  check_dtype(op, "key_start", key_start, ScalarType::Int);
  check_dtype(op, "key_end", key_end, ScalarType::Int);

  problem.query = arguments.query.const_data_ptr();
  problem.key = arguments.key.const_data_ptr();
  problem.value = arguments.value.const_data_ptr();
  problem.grad_output = arguments.grad_output.const_data_ptr();
  problem.logsumexp = arguments.logsumexp.const_data_ptr<float>();
  problem.row = arguments.row.const_data_ptr<float>();
  problem.key_start = arguments.key_start.const_data_ptr<int32_t>();
  problem.key_end = arguments.key_end.const_data_ptr<int32_t>();
  problem.result = arguments.result.mutable_data_ptr<float>();
  for (int64_t axis = 0; axis < 3; ++axis) {
    problem.query_stride[axis] = arguments.query.stride(axis);
    problem.key_stride[axis] = arguments.key.stride(axis);
    problem.value_stride[axis] = arguments.value.stride(axis);
  }
  for (int64_t axis = 0; axis < 4; ++axis) problem.grad_stride[axis] = arguments.grad_output.stride(axis);
  return arguments;
}

}  // namespace fastxai
