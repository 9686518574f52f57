// Turns tensors into the plain problem description.
#pragma once

#include <tuple>

#include "arguments.h"
#include "glimpse_statistics.h"

namespace fastxai {

// Holds what the problem points into, as long as the problem is used.
struct GlimpseStatisticsArguments {
  Tensor query, key, value, grad_output, logsumexp, key_start, key_end, sum_start, sum_end;
  Tensor row_sums, gradient_sums, norm;
  GlimpseStatistics problem;

  std::tuple<Tensor, Tensor, Tensor> results() const { return {row_sums, gradient_sums, norm}; }
};

inline GlimpseStatisticsArguments describe_statistics(const Tensor& query, const Tensor& key, const Tensor& value,
                                                      const Tensor& grad_output, const Tensor& logsumexp,
                                                      const Tensor& key_start, const Tensor& key_end,
                                                      const Tensor& sum_start, const Tensor& sum_end, double scale) {
  const char* const op = "glimpse_statistics";
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && grad_output.dim() == 5, op,
                  ": expected query (B,H,Sq,d), key (B,Hkv,Sk,d), grad_output (B,N,H,Sq,d)");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), width = query.size(3);
  const int64_t key_heads = key.size(1), keys = key.size(2), targets = grad_output.size(1);
  STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, op, ": the key heads must divide the query heads");
  GlimpseStatisticsArguments arguments{with_contiguous_last_axis(query),
                                       with_contiguous_last_axis(key),
                                       with_contiguous_last_axis(value),
                                       with_contiguous_last_axis(grad_output),
                                       with_dense_layout(logsumexp),
                                       with_dense_layout(key_start),
                                       with_dense_layout(key_end),
                                       with_dense_layout(sum_start),
                                       with_dense_layout(sum_end),
                                       torch::stable::new_empty(logsumexp, {batch, targets, heads, queries}),
                                       torch::stable::new_empty(logsumexp, {batch, targets, heads}),
                                       torch::stable::new_empty(logsumexp, {batch, targets}),
                                       {}};
  check_shape(op, "key", key, {batch, key_heads, keys, width});
  check_shape(op, "value", value, {batch, key_heads, keys, width});
  check_shape(op, "grad_output", grad_output, {batch, targets, heads, queries, width});
  check_shape(op, "logsumexp", logsumexp, {batch, heads, queries});
  check_shape(op, "key_start", key_start, {batch, queries});
  check_shape(op, "key_end", key_end, {batch, queries});
  check_shape(op, "sum_start", sum_start, {batch, queries});
  check_shape(op, "sum_end", sum_end, {batch, queries});
  check_dtype(op, "key", key, query.scalar_type());
  check_dtype(op, "value", value, query.scalar_type());
  check_dtype(op, "grad_output", grad_output, query.scalar_type());
  check_dtype(op, "logsumexp", logsumexp, ScalarType::Float);
  check_dtype(op, "key_start", key_start, ScalarType::Int);
  check_dtype(op, "key_end", key_end, ScalarType::Int);
  check_dtype(op, "sum_start", sum_start, ScalarType::Int);
  check_dtype(op, "sum_end", sum_end, ScalarType::Int);

  GlimpseStatistics& problem = arguments.problem;
  problem.element = element_of(op, query);
  problem.batch = batch;
  problem.targets = targets;
  problem.heads = heads;
  problem.key_heads = key_heads;
  problem.queries = queries;
  problem.keys = keys;
  problem.width = width;
  problem.scale = static_cast<float>(scale);
  problem.query = arguments.query.const_data_ptr();
  problem.key = arguments.key.const_data_ptr();
  problem.value = arguments.value.const_data_ptr();
  problem.grad_output = arguments.grad_output.const_data_ptr();
  problem.logsumexp = arguments.logsumexp.const_data_ptr<float>();
  problem.key_start = arguments.key_start.const_data_ptr<int32_t>();
  problem.key_end = arguments.key_end.const_data_ptr<int32_t>();
  problem.sum_start = arguments.sum_start.const_data_ptr<int32_t>();
  problem.sum_end = arguments.sum_end.const_data_ptr<int32_t>();
  problem.row_sums = arguments.row_sums.mutable_data_ptr<float>();
  problem.gradient_sums = arguments.gradient_sums.mutable_data_ptr<float>();
  problem.norm = arguments.norm.mutable_data_ptr<float>();
  for (int64_t axis = 0; axis < 3; ++axis) {
    problem.query_stride[axis] = arguments.query.stride(axis);
    problem.key_stride[axis] = arguments.key.stride(axis);
    problem.value_stride[axis] = arguments.value.stride(axis);
  }
  for (int64_t axis = 0; axis < 4; ++axis) problem.grad_stride[axis] = arguments.grad_output.stride(axis);
  return arguments;
}

}  // namespace fastxai
