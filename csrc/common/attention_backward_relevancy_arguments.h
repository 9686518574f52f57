// Turns tensors into the plain problem description.
#pragma once

#include <tuple>

#include "arguments.h"
#include "attention_backward_relevancy.h"

namespace fastxai {

// Holds what the problem points into, as long as the problem is used.
struct AttentionBackwardRelevancyArguments {
  Tensor query, key, value, output, grad_output, logsumexp, row, key_start, key_end;
  Tensor grad_query, grad_key, grad_value, product;
  AttentionBackwardRelevancy problem;

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {grad_query, grad_key, grad_value, product}; }
};

inline AttentionBackwardRelevancyArguments describe_backward(const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& output,
                                                             const Tensor& grad_output, const Tensor& logsumexp,
                                                             const Tensor& row, const Tensor& key_start,
                                                             const Tensor& key_end, double scale) {
  const char* const op = "attention_backward_relevancy";
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && grad_output.dim() == 5 && row.dim() == 3, op,
                  ": expected query (B,H,Sq,d), key (B,Hkv,Sk,d), grad_output (B,N,H,Sq,d), row (B,N,Sq)");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), width = query.size(3);
  const int64_t key_heads = key.size(1), keys = key.size(2), targets = row.size(1);
  AttentionBackwardRelevancyArguments arguments{
      with_contiguous_last_axis(query),
      with_contiguous_last_axis(key),
      with_contiguous_last_axis(value),
      with_contiguous_last_axis(output),
      with_contiguous_last_axis(grad_output),
      with_dense_layout(logsumexp),
      with_dense_layout(row),
      with_dense_layout(key_start),
      with_dense_layout(key_end),
      torch::stable::new_empty(query, {batch, targets, heads, queries, width}),
      torch::stable::new_empty(query, {batch, targets, key_heads, keys, width}),
      torch::stable::new_empty(query, {batch, targets, key_heads, keys, width}),
      torch::stable::new_empty(row, {batch, targets, keys}),
      {}};
  describe_attention(op, scale, arguments);
  check_shape(op, "output", output, {batch, heads, queries, width});
  check_shape(op, "grad_output", grad_output, {batch, targets, heads, queries, width});
  check_shape(op, "row", row, {batch, targets, queries});
  check_dtype(op, "output", output, query.scalar_type());
  check_dtype(op, "row", row, ScalarType::Float);

  AttentionBackwardRelevancy& problem = arguments.problem;
  problem.targets = targets;
  problem.output = arguments.output.const_data_ptr();
  problem.row = arguments.row.const_data_ptr<float>();
  problem.grad_query = arguments.grad_query.mutable_data_ptr();
  problem.grad_key = arguments.grad_key.mutable_data_ptr();
  problem.grad_value = arguments.grad_value.mutable_data_ptr();
  problem.product = arguments.product.mutable_data_ptr<float>();
  for (int64_t axis = 0; axis < 3; ++axis) problem.output_stride[axis] = arguments.output.stride(axis);
  return arguments;
}

}  // namespace fastxai
