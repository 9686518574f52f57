// CUDA entry point of attention_backward_relevancy.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/attention_backward_relevancy_arguments.h"
#include "attention_backward_relevancy.cuh"
#include "launch.h"

namespace fastxai::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_relevancy(Tensor query, Tensor key, Tensor value,
                                                                        Tensor output, Tensor grad_output,
                                                                        Tensor logsumexp, Tensor row, Tensor key_start,
                                                                        Tensor key_end, double scale) {
  const char* const op = "attention_backward_relevancy";
  const int32_t index = query.get_device_index();
  const DeviceGuard guard(op, index);
  const AttentionBackwardRelevancyArguments arguments =
      describe_backward(query, key, value, output, grad_output, logsumexp, row, key_start, key_end, scale);
  const AttentionBackwardRelevancy& problem = arguments.problem;
  if (problem.batch * problem.targets == 0) return arguments.results();
  STD_TORCH_CHECK(problem.heads <= 65535 && problem.batch * problem.targets <= 65535, op,
                  ": the CUDA kernel takes at most 65535 heads, and as many targets of all samples");
  const BackwardPlan plan = make_plan(problem);
  // Returned to torch's caching allocator on exit, which orders reuse behind this stream.
  const Tensor ranges = torch::stable::new_empty(key_start, {tile_range_count(problem, plan) * 4});
  const Tensor states = torch::stable::new_empty(key_start, {state_count(problem) * 8});
  const Tensor partial = torch::stable::new_empty(row, {partial_count(problem)});
  static_assert(sizeof(TileRange) == 4 * sizeof(int32_t) && sizeof(RowState) == 8 * sizeof(int32_t));
  launch_kernels(problem, plan, describe_device(op, index),
                 reinterpret_cast<TileRange*>(ranges.mutable_data_ptr<int32_t>()),
                 reinterpret_cast<RowState*>(states.mutable_data_ptr<int32_t>()), partial.mutable_data_ptr<float>(),
                 LaunchOnStream{op, current_stream(op, index)});
  return arguments.results();
}

}  // namespace
}  // namespace fastxai::cuda

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CUDA, m) {
  m.impl("attention_backward_relevancy", TORCH_BOX(&fastxai::cuda::attention_backward_relevancy));
}
