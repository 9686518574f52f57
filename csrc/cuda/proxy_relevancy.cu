// CUDA entry point of proxy_relevancy.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/proxy_relevancy_arguments.h"
#include "launch.h"
#include "proxy_relevancy.cuh"

namespace fastxai::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> proxy_relevancy(Tensor hidden, Tensor query, Tensor offset, Tensor lengths,
                                                   double eps, bool centered, bool softmax) {
  const char* const op = "proxy_relevancy";
  const int32_t index = hidden.get_device_index();
  const DeviceGuard guard(op, index);
  const ProxyRelevancyArguments arguments = describe_proxy(hidden, query, offset, lengths, eps, centered, softmax);
  const ProxyRelevancy& problem = arguments.problem;
  if (problem.batch * problem.targets == 0) return arguments.results();
  STD_TORCH_CHECK(problem.batch <= 65535 && blocks(problem.targets, kProxyRows) <= 65535, op,
                  ": the CUDA kernel takes at most 65535 samples, and as many times ", kProxyRows, " targets");
  launch_kernels(problem, LaunchOnStream{op, current_stream(op, index)});
  return arguments.results();
}

}  // namespace
}  // namespace fastxai::cuda

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CUDA, m) {
  m.impl("proxy_relevancy", TORCH_BOX(&fastxai::cuda::proxy_relevancy));
}
