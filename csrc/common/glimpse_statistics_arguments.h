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
  const int64_t batch = query.size(0), targets = grad_output.size(1), heads = query.size(1), queries = query.size(2);
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
  describe_attention(op, scale, arguments);
  check_shape(op, "sum_start", sum_start, {batch, queries});
  check_shape(op, "sum_end", sum_end, {batch, queries});
  check_dtype(op, "sum_start", sum_start, ScalarType::Int);
  check_dtype(op, "sum_end", sum_end, ScalarType::Int);

  GlimpseStatistics& problem = arguments.problem;
  problem.targets = targets;
  problem.sum_start = arguments.sum_start.const_data_ptr<int32_t>();
  problem.sum_end = arguments.sum_end.const_data_ptr<int32_t>();
  problem.row_sums = arguments.row_sums.mutable_data_ptr<float>();
  problem.gradient_sums = arguments.gradient_sums.mutable_data_ptr<float>();
  problem.norm = arguments.norm.mutable_data_ptr<float>();
  return arguments;
}

}  // namespace fastxai
