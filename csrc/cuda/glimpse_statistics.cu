// CUDA entry point of glimpse_statistics.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/glimpse_statistics_arguments.h"
#include "glimpse_statistics.cuh"
#include "launch.h"

namespace fastxai::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> glimpse_statistics(Tensor query, Tensor key, Tensor value, Tensor grad_output,
                                                      Tensor logsumexp, Tensor key_start, Tensor key_end,
                                                      Tensor sum_start, Tensor sum_end, double scale) {
  const char* const op = "glimpse_statistics";
  const int32_t index = query.get_device_index();
  const DeviceGuard guard(op, index);
  const GlimpseStatisticsArguments arguments =
      describe_statistics(query, key, value, grad_output, logsumexp, key_start, key_end, sum_start, sum_end, scale);
  const GlimpseStatistics& problem = arguments.problem;
  if (problem.batch * problem.targets == 0) return arguments.results();
  STD_TORCH_CHECK(problem.batch * problem.targets <= 65535, op,
                  ": the CUDA kernel takes at most 65535 targets of all samples");
  const Device device = describe_device(op, index);
  const StatisticsPlan plan = make_plan(problem, device);
  // Returned to torch's caching allocator on exit, which orders reuse behind this stream.
  const Tensor ranges = torch::stable::new_empty(arguments.key_start, {tile_range_count(problem, plan) * 4});
  const Tensor sums = torch::stable::new_empty(arguments.logsumexp, {sum_count(problem, plan) * 2});
  const Tensor norms = torch::stable::new_empty(arguments.logsumexp, {norm_count(problem, plan)});
  static_assert(sizeof(TileRange) == 4 * sizeof(int32_t) && sizeof(RowSums) == 2 * sizeof(float));
  launch_kernels(problem, plan, device, reinterpret_cast<TileRange*>(ranges.mutable_data_ptr<int32_t>()),
                 reinterpret_cast<RowSums*>(sums.mutable_data_ptr<float>()), norms.mutable_data_ptr<float>(),
                 LaunchOnStream{op, current_stream(op, index)});
  return arguments.results();
}

}  // namespace
}  // namespace fastxai::cuda

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CUDA, m) {
  m.impl("glimpse_statistics", TORCH_BOX(&fastxai::cuda::glimpse_statistics));
}
