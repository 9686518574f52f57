// CPU entry point: hands (sample, target, key head, share of the keys) tasks to threads, adds the shares up.

#include <torch/csrc/stable/library.h>

#include "../common/attention_backward_relevancy_arguments.h"
#include "attention_backward_relevancy_kernel.h"
#include "threads.h"

namespace fastxai::cpu {
namespace {

// Shares that the keys of a key head are dealt into: as few as keep all threads busy, since each takes memory for the
// rows of grad_query.
int64_t share_count(const AttentionBackwardRelevancy& problem, int64_t key_block) {
  constexpr int64_t kTasksPerThread = 3, kMost = 8;
  const int64_t key_heads = std::max<int64_t>(1, problem.batch * problem.targets * problem.key_heads);
  const int64_t wanted = (kTasksPerThread * torch::stable::get_num_threads() + key_heads - 1) / key_heads;
  const int64_t blocks = (problem.keys + key_block - 1) / key_block;
  return std::max<int64_t>(1, std::min({wanted, kMost, blocks}));
}

// Key heads are added in ascending order, so the result does not depend on which thread did what.
void average_heads(const AttentionBackwardRelevancy& problem, const float* partial) {
  const float share = 1.0f / static_cast<float>(problem.heads);
  for (int64_t target = 0; target < problem.batch * problem.targets; ++target) {
    for (int64_t j = 0; j < problem.keys; ++j) {
      float sum = 0.0f;
      for (int64_t h = 0; h < problem.key_heads; ++h)
        sum += partial[(target * problem.key_heads + h) * problem.keys + j];
      problem.product[target * problem.keys + j] = sum * share;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_relevancy(Tensor query, Tensor key, Tensor value,
                                                                        Tensor output, Tensor grad_output,
                                                                        Tensor logsumexp, Tensor row, Tensor key_start,
                                                                        Tensor key_end, double scale) {
  const AttentionBackwardRelevancyArguments arguments =
      describe_backward(query, key, value, output, grad_output, logsumexp, row, key_start, key_end, scale);
  const AttentionBackwardRelevancy& problem = arguments.problem;
  const auto& kernel = choose_kernel({FASTXAI_KERNELS(attention_backward_relevancy)});
  const RowLists lists(problem, [](int64_t, int64_t) { return true; });

  const int64_t shares = share_count(problem, kernel.key_block), pitch = kernel.row_pitch(problem);
  const int64_t group = problem.heads / problem.key_heads;
  const int64_t key_heads = problem.batch * problem.targets * problem.key_heads;
  const int64_t share_stride = key_heads * group * problem.queries * pitch;
  const Tensor grad_query = allocate(row, shares * share_stride);
  const Tensor product = allocate(row, key_heads * problem.keys);
  float* const grad_query_data = grad_query.mutable_data_ptr<float>();
  float* const product_data = product.mutable_data_ptr<float>();
  run_tasks(key_heads * shares, row, kernel.scratch_floats(problem), [&](int64_t number, float* scratch) {
    const int64_t key_head = number / shares, share = number % shares, target = key_head / problem.key_heads;
    const BackwardTask task{target / problem.targets, target % problem.targets, key_head % problem.key_heads, share,
                            shares};
    kernel.run(problem, lists.of(task.sample), task, scratch,
               grad_query_data + share * share_stride + key_head * group * problem.queries * pitch,
               product_data + key_head * problem.keys);
  });
  run_tasks(key_heads * group, row, 0,
            [&](int64_t head, float*) { kernel.add_shares(problem, head, grad_query_data, share_stride, shares); });
  average_heads(problem, product_data);
  return arguments.results();
}

}  // namespace
}  // namespace fastxai::cpu

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CPU, m) {
  m.impl("attention_backward_relevancy", TORCH_BOX(&fastxai::cpu::attention_backward_relevancy));
}
