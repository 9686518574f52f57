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
  STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, op, ": the key heads must divide the query heads");
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
  check_shape(op, "key", key, {batch, key_heads, keys, width});
  check_shape(op, "value", value, {batch, key_heads, keys, width});
  check_shape(op, "output", output, {batch, heads, queries, width});
  check_shape(op, "grad_output", grad_output, {batch, targets, heads, queries, width});
  check_shape(op, "logsumexp", logsumexp, {batch, heads, queries});
  check_shape(op, "row", row, {batch, targets, queries});
  check_shape(op, "key_start", key_start, {batch, queries});
  check_shape(op, "key_end", key_end, {batch, queries});
  check_dtype(op, "key", key, query.scalar_type());
  check_dtype(op, "value", value, query.scalar_type());
  check_dtype(op, "output", output, query.scalar_type());
  check_dtype(op, "grad_output", grad_output, query.scalar_type());
  check_dtype(op, "logsumexp", logsumexp, ScalarType::Float);
  check_dtype(op, "row", row, ScalarType::Float);
  check_dtype(op, "key_start", key_start, ScalarType::Int);
  check_dtype(op, "key_end", key_end, ScalarType::Int);

  AttentionBackwardRelevancy& problem = arguments.problem;
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
  problem.output = arguments.output.const_data_ptr();
  problem.grad_output = arguments.grad_output.const_data_ptr();
  problem.logsumexp = arguments.logsumexp.const_data_ptr<float>();
  problem.row = arguments.row.const_data_ptr<float>();
  problem.key_start = arguments.key_start.const_data_ptr<int32_t>();
  problem.key_end = arguments.key_end.const_data_ptr<int32_t>();
  problem.grad_query = arguments.grad_query.mutable_data_ptr();
  problem.grad_key = arguments.grad_key.mutable_data_ptr();
  problem.grad_value = arguments.grad_value.mutable_data_ptr();
  problem.product = arguments.product.mutable_data_ptr<float>();
  for (int64_t axis = 0; axis < 3; ++axis) {
    problem.query_stride[axis] = arguments.query.stride(axis);
    problem.key_stride[axis] = arguments.key.stride(axis);
    problem.value_stride[axis] = arguments.value.stride(axis);
    problem.output_stride[axis] = arguments.output.stride(axis);
  }
  for (int64_t axis = 0; axis < 4; ++axis) problem.grad_stride[axis] = arguments.grad_output.stride(axis);
  return arguments;
}

}  // namespace fastxai
