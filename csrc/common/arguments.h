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

}  // namespace fastxai
