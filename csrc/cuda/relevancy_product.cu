// CUDA entry point. cudart is linked statically and torch's CUDA library is looked up at run time, so the library that
// holds this also loads beside a torch without CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>

#include "../common/relevancy_product_arguments.h"
#include "launch.h"
#include "relevancy_product.cuh"

namespace fastxai::cuda {
namespace {

// Whether the product is added up with atomics: one kernel and a buffer less, for sums whose last bits differ from call
// to call. Read on every call, so that both can be measured in one process.
bool wants_atomics() {
  const char* const wanted = std::getenv("LVLM_FASTXAI_CUDA_ATOMICS");
  return wanted != nullptr && std::strcmp(wanted, "1") == 0;
}

Tensor relevancy_product(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor row,
                         Tensor key_start, Tensor key_end, double scale) {
  const char* const op = "relevancy_product";
  const DeviceGuard guard(op, query.get_device_index());
  const RelevancyProductArguments arguments =
      describe(query, key, value, grad_output, logsumexp, row, key_start, key_end, scale);
  const RelevancyProduct& problem = arguments.problem;
  if (arguments.result.numel() == 0) return arguments.result;
  const int32_t index = query.get_device_index();
  const Device device = describe_device(op, index);
  const Plan plan = make_plan(problem, device, wants_atomics());
  STD_TORCH_CHECK(problem.heads * plan.splits <= 65535 && problem.batch * problem.targets <= 65535,
                  "relevancy_product: the CUDA kernel takes at most 65535 heads, and as many targets of all samples");
  // Returned to torch's caching allocator on exit, which orders reuse behind this stream.
  const Tensor ranges = torch::stable::new_empty(key_start, {tile_range_count(problem, plan) * 4});
  const Tensor partial = torch::stable::new_empty(row, {partial_count(problem, plan)});
  static_assert(sizeof(TileRange) == 4 * sizeof(int32_t));
  launch_kernels(problem, plan, device, reinterpret_cast<TileRange*>(ranges.mutable_data_ptr<int32_t>()),
                 partial.mutable_data_ptr<float>(), LaunchOnStream{op, current_stream(op, index)});
  return arguments.result;
}

}  // namespace
}  // namespace fastxai::cuda

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CUDA, m) {
  m.impl("relevancy_product", TORCH_BOX(&fastxai::cuda::relevancy_product));
}
