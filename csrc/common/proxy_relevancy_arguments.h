// Turns tensors into the plain problem description.
#pragma once

#include <tuple>

#include "arguments.h"
#include "proxy_relevancy.h"

namespace fastxai {

// Holds what the problem points into, as long as the problem is used.
struct ProxyRelevancyArguments {
  Tensor hidden, query, offset, lengths, map, entropy, bernoulli;
  ProxyRelevancy problem;

  std::tuple<Tensor, Tensor, Tensor> results() const { return {map, entropy, bernoulli}; }
};

inline ProxyRelevancyArguments describe_proxy(const Tensor& hidden, const Tensor& query, const Tensor& offset,
                                              const Tensor& lengths, double eps, bool centered, bool softmax) {
  const char* const op = "proxy_relevancy";
  STD_TORCH_CHECK(hidden.dim() == 3 && query.dim() == 3, op, ": expected hidden (B,S,D), query (B,N,D)");
  const int64_t batch = hidden.size(0), columns = hidden.size(1), width = hidden.size(2), targets = query.size(1);
  STD_TORCH_CHECK(width > 0, op, ": `hidden` must have a width of at least 1");
  check_shape(op, "query", query, {batch, targets, width});
  check_shape(op, "offset", offset, {batch, targets});
  check_shape(op, "lengths", lengths, {batch});
  check_dtype(op, "query", query, ScalarType::Float);
  check_dtype(op, "offset", offset, ScalarType::Float);
  check_dtype(op, "lengths", lengths, ScalarType::Int);
  ProxyRelevancyArguments arguments{with_contiguous_last_axis(hidden),
                                    with_dense_layout(query),
                                    with_dense_layout(offset),
                                    with_dense_layout(lengths),
                                    torch::stable::new_empty(query, {batch, targets, columns}),
                                    torch::stable::new_empty(query, {batch, targets}),
                                    torch::stable::new_empty(query, {batch, targets}),
                                    {}};
  ProxyRelevancy& problem = arguments.problem;
  problem.element = element_of(op, hidden);
  problem.hidden = arguments.hidden.const_data_ptr();
  problem.query = arguments.query.const_data_ptr<float>();
  problem.offset = arguments.offset.const_data_ptr<float>();
  problem.lengths = arguments.lengths.const_data_ptr<int32_t>();
  problem.map = arguments.map.mutable_data_ptr<float>();
  problem.entropy = arguments.entropy.mutable_data_ptr<float>();
  problem.bernoulli = arguments.bernoulli.mutable_data_ptr<float>();
  problem.batch = batch;
  problem.columns = columns;
  problem.targets = targets;
  problem.width = width;
  problem.hidden_stride[0] = arguments.hidden.stride(0);
  problem.hidden_stride[1] = arguments.hidden.stride(1);
  problem.eps = static_cast<float>(eps);
  problem.centered = centered;
  problem.softmax = softmax;
  return arguments;
}

}  // namespace fastxai
