// CUDA entry point. cudart is linked statically and torch's CUDA library is looked up at run time, so the library that
// holds this also loads beside a torch without CUDA.

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/relevancy_product_arguments.h"
#include "relevancy_product.cuh"

namespace fastxai::cuda {
namespace {

void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "relevancy_product: CUDA error: ", cudaGetErrorString(status));
}

cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(
        dlsym(torch_cuda == nullptr ? RTLD_DEFAULT : torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "relevancy_product: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "relevancy_product: torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

unsigned blocks(int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

template <typename T>
void launch(const RelevancyProduct& problem, float* partial, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(problem.heads), batch = static_cast<unsigned>(problem.batch);
  relevancy_product_columns<T><<<dim3(blocks(problem.keys), heads, batch), kThreads, 0, stream>>>(problem, partial);
  check(cudaGetLastError());
  average_heads<<<dim3(blocks(problem.targets * problem.keys), batch), kThreads, 0, stream>>>(problem, partial);
  check(cudaGetLastError());
}

Tensor relevancy_product(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor row,
                         Tensor key_start, Tensor key_end, double scale) {
  const DeviceGuard guard(query.get_device_index());
  const RelevancyProductArguments arguments =
      describe(query, key, value, grad_output, logsumexp, row, key_start, key_end, scale);
  const RelevancyProduct& problem = arguments.problem;
  if (arguments.result.numel() == 0) return arguments.result;
  STD_TORCH_CHECK(problem.heads <= 65535 && problem.batch <= 65535,
                  "relevancy_product: the CUDA kernel takes at most 65535 heads and samples");
  // Returned to torch's caching allocator on exit, which orders reuse behind this stream.
  const Tensor partial =
      torch::stable::new_zeros(row, {problem.batch * problem.heads * problem.targets * problem.keys});
  const cudaStream_t stream = current_stream(query.get_device_index());
  float* sums = partial.mutable_data_ptr<float>();
  switch (problem.element) {
    case Element::kFloat32:
      launch<float>(problem, sums, stream);
      break;
    case Element::kBFloat16:
      launch<BFloat16>(problem, sums, stream);
      break;
    case Element::kFloat16:
      launch<Float16>(problem, sums, stream);
      break;
  }
  return arguments.result;
}

}  // namespace
}  // namespace fastxai::cuda

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CUDA, m) {
  m.impl("relevancy_product", TORCH_BOX(&fastxai::cuda::relevancy_product));
}
