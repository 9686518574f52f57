// What the CUDA entry points of all operators share. Nothing here waits for the device: kernels go to torch's current
// stream of the tensors' device, their memory comes from torch, so that a call can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include "shared_kernels.cuh"

namespace fastxai::cuda {

inline void check(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(status));
}

inline cudaStream_t current_stream(const char* op, int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(
        dlsym(torch_cuda == nullptr ? RTLD_DEFAULT : torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, op, ": this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, op, ": torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int32_t device) {
    check(op, cudaGetDevice(&previous_));
    check(op, cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

inline Device describe_device(const char* op, int32_t index) {
  int multiprocessors = 0, major = 0;
  check(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  return {multiprocessors, major >= 8};
}

struct LaunchOnStream {
  const char* op;
  cudaStream_t stream;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, const Arguments&... arguments) const {
    start(kernel, grid, shared_bytes, false, arguments...);
  }

  // For a kernel that calls ptx::wait_for_kernel_before(): it may begin while the one before it in the stream runs.
  template <typename... Parameters, typename... Arguments>
  void overlapping(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, const Arguments&... arguments) const {
    // Machine code that was made from PTX for older devices does not wait.
    cudaFuncAttributes compiled;
    check(op, cudaFuncGetAttributes(&compiled, kernel));
    start(kernel, grid, shared_bytes, compiled.ptxVersion >= 90, arguments...);
  }

 private:
  template <typename... Parameters, typename... Arguments>
  void start(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, bool overlaps,
             const Arguments&... arguments) const {
    // What a kernel may use without being asked; more than that differs between devices.
    if (shared_bytes > 48 << 10) {
      check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = overlaps ? 1 : 0;
    check(op, cudaLaunchKernelEx(&config, kernel, arguments...));
  }
};

}  // namespace fastxai::cuda
