// What the entry points of all operators check of tensors; the last line of defence behind the checks made in Python.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

#include "element.h"

namespace fastxai {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor with_contiguous_last_axis(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor with_dense_layout(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Element element_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the native kernels take float32, bfloat16 and float16");
  }
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(expected.size()), op, ": `", name, "` must have ",
                  expected.size(), " dimensions, got ", tensor.dim());
  int64_t axis = 0;
  for (int64_t size : expected) {
    STD_TORCH_CHECK(tensor.size(axis) == size, op, ": `", name, "` must have size ", size, " in axis ", axis, ", got ",
                    tensor.size(axis));
    ++axis;
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, op, ": `", name, "` has an unexpected dtype");
}

// Checks what every operator takes of an attention, and enters it in the description of the operator's problem.
// arguments: query (B,H,Sq,d), key and value (B,Hkv,Sk,d), grad_output (B,any,H,Sq,d), logsumexp, key_start, key_end,
// and the problem; the three whose axes are counted here must have been found to have 4, 4 and 5.
template <typename Arguments>
void describe_attention(const char* op, double scale, Arguments& arguments) {
  const Tensor& query = arguments.query;
  const Tensor& key = arguments.key;
  const Tensor& grad_output = arguments.grad_output;
  auto& problem = arguments.problem;
  problem.element = element_of(op, query);
  problem.batch = query.size(0);
  problem.heads = query.size(1);
  problem.queries = query.size(2);
  problem.width = query.size(3);
  problem.key_heads = key.size(1);
  problem.keys = key.size(2);
  problem.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(problem.key_heads > 0 && problem.heads % problem.key_heads == 0, op,
                  ": the key heads must divide the query heads");
  check_shape(op, "key", key, {problem.batch, problem.key_heads, problem.keys, problem.width});
  check_shape(op, "value", arguments.value, {problem.batch, problem.key_heads, problem.keys, problem.width});
  check_shape(op, "grad_output", grad_output,
              {problem.batch, grad_output.size(1), problem.heads, problem.queries, problem.width});
  check_shape(op, "logsumexp", arguments.logsumexp, {problem.batch, problem.heads, problem.queries});
  check_shape(op, "key_start", arguments.key_start, {problem.batch, problem.queries});
  check_shape(op, "key_end", arguments.key_end, {problem.batch, problem.queries});
  check_dtype(op, "key", key, query.scalar_type());
  check_dtype(op, "value", arguments.value, query.scalar_type());
  check_dtype(op, "grad_output", grad_output, query.scalar_type());
  check_dtype(op, "logsumexp", arguments.logsumexp, ScalarType::Float);
  check_dtype(op, "key_start", arguments.key_start, ScalarType::Int);
  check_dtype(op, "key_end", arguments.key_end, ScalarType::Int);

  problem.query = query.const_data_ptr();
  problem.key = key.const_data_ptr();
  problem.value = arguments.value.const_data_ptr();
  problem.grad_output = grad_output.const_data_ptr();
  problem.logsumexp = arguments.logsumexp.template const_data_ptr<float>();
  problem.key_start = arguments.key_start.template const_data_ptr<int32_t>();
  problem.key_end = arguments.key_end.template const_data_ptr<int32_t>();
  for (int64_t axis = 0; axis < 3; ++axis) {
    problem.query_stride[axis] = query.stride(axis);
    problem.key_stride[axis] = key.stride(axis);
    problem.value_stride[axis] = arguments.value.stride(axis);
  }
  for (int64_t axis = 0; axis < 4; ++axis) problem.grad_stride[axis] = grad_output.stride(axis);
}

}  // namespace fastxai
