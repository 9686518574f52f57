// What the operators' files in this folder share: the description of a problem, how kernels are launched on the host,
// and what is expected of each kernel's machine code.
#pragma once

#include <cxxabi.h>

#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

#include "cuda_on_host.h"

#include "../../csrc/cuda/shared_kernels.cuh"

using namespace fastxai::cuda;

namespace {

// What every operator's problem has under the same names. Strides, in elements: three of each tensor, four of
// grad_output, which comes last.
template <typename Problem>
void fill(Problem& p, int32_t element, const void* const* tensors, const int64_t* sizes, const int64_t* strides,
          float scale) {
  p.element = static_cast<fastxai::Element>(element), p.scale = scale;
  p.query = tensors[0], p.key = tensors[1], p.value = tensors[2], p.grad_output = tensors[3];
  p.logsumexp = static_cast<const float*>(tensors[4]);
  p.key_start = static_cast<const int32_t*>(tensors[6]), p.key_end = static_cast<const int32_t*>(tensors[7]);
  p.batch = sizes[0], p.targets = sizes[1], p.heads = sizes[2], p.key_heads = sizes[3];
  p.queries = sizes[4], p.keys = sizes[5], p.width = sizes[6];
  std::memcpy(p.query_stride, strides, sizeof(p.query_stride));
  std::memcpy(p.key_stride, strides + 3, sizeof(p.key_stride));
  std::memcpy(p.value_stride, strides + 6, sizeof(p.value_stride));
  std::memcpy(p.grad_stride, strides + 9, sizeof(p.grad_stride));
}

}  // namespace

// As test_cuda_on_host.py has it.
struct Options {
  int32_t multiprocessors, tensor_cores, backwards, atomics;

  Device device() const { return {multiprocessors, tensor_cores != 0}; }
  cuda_on_host::Launch launch() const { return {kThreads, backwards != 0}; }
};

// One kernel: the most shared memory that a launch asks for, whether it multiplies matrices, and how many 16-byte loads
// it makes at least.
struct Expected {
  std::string name;
  int64_t shared_bytes;
  bool multiplies;
  int loads;
};

inline std::vector<Expected>& expected_kernels() {
  static std::vector<Expected> all;
  return all;
}

template <typename Tiles>
void expect(const char* kernel, int64_t shared_bytes, bool multiplies = true, int loads = 0) {
  const char* const tiles = abi::__cxa_demangle(typeid(Tiles).name(), nullptr, nullptr, nullptr);
  expected_kernels().push_back({std::string(kernel) + "<" + tiles + " >", shared_bytes, multiplies, loads});
}

template <typename T>
struct Type {
  using type = T;
};

template <typename... Types, typename Function>
void each_of(const Function& function) {
  (function(Type<Types>{}), ...);
}

// Expects a template, which is called for each type of elements.
#define FASTXAI_EXPECT(operator, function)                         \
  [[maybe_unused]] static const bool operator##_is_expected = [] { \
    function<float>();                                             \
    function<fastxai::cuda::BFloat16>();                           \
    function<fastxai::cuda::Float16>();                            \
    return true;                                                   \
  }()
