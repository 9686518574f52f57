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

Device describe_device(int32_t index) {
  int multiprocessors = 0, major = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  return {multiprocessors, major >= 8};
}

struct LaunchOnStream {
  cudaStream_t stream;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, const Arguments&... arguments) const {
    // What a kernel may use without being asked; more than that differs between devices.
    if (shared_bytes > 48 << 10) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    kernel<<<grid, kThreads, shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError());
  }
};

Tensor relevancy_product(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor row,
                         Tensor key_start, Tensor key_end, double scale) {
  const DeviceGuard guard(query.get_device_index());
  const RelevancyProductArguments arguments =
      describe(query, key, value, grad_output, logsumexp, row, key_start, key_end, scale);
  const RelevancyProduct& problem = arguments.problem;
  if (arguments.result.numel() == 0) return arguments.result;
  const int32_t index = query.get_device_index();
  const Device device = describe_device(index);
  const Plan plan = make_plan(problem, device);
  STD_TORCH_CHECK(problem.heads * plan.splits <= 65535 && problem.batch * problem.targets <= 65535,
                  "relevancy_product: the CUDA kernel takes at most 65535 heads, and as many targets of all samples");
  // Returned to torch's caching allocator on exit, which orders reuse behind this stream.
  const Tensor ranges = torch::stable::new_empty(key_start, {tile_range_count(problem, plan) * 4});
  const Tensor partial = torch::stable::new_empty(row, {partial_count(problem, plan)});
  static_assert(sizeof(TileRange) == 4 * sizeof(int32_t));
  launch_kernels(problem, plan, device, reinterpret_cast<TileRange*>(ranges.mutable_data_ptr<int32_t>()),
                 partial.mutable_data_ptr<float>(), LaunchOnStream{current_stream(index)});
  return arguments.result;
}

}  // namespace
}  // namespace fastxai::cuda

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CUDA, m) {
  m.impl("relevancy_product", TORCH_BOX(&fastxai::cuda::relevancy_product));
}
