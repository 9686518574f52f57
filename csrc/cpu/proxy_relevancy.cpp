// CPU entry point: hands (sample, block of columns) tasks to threads for the scores, then the rows of scores.

#include <torch/csrc/stable/library.h>

#include "../common/proxy_relevancy_arguments.h"
#include "proxy_relevancy_kernel.h"
#include "threads.h"

namespace fastxai::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> proxy_relevancy(Tensor hidden, Tensor query, Tensor offset, Tensor lengths,
                                                   double eps, bool centered, bool softmax) {
  const ProxyRelevancyArguments arguments = describe_proxy(hidden, query, offset, lengths, eps, centered, softmax);
  const ProxyRelevancy& problem = arguments.problem;
  const auto& kernel = choose_kernel({FASTXAI_KERNELS(proxy_relevancy)});
  const auto length_of = [&](int64_t sample) {
    return std::clamp<int64_t>(problem.lengths[sample], 0, problem.columns);
  };

  const int64_t block = kernel.column_block(problem, torch::stable::get_num_threads());
  const int64_t blocks = problem.targets == 0 ? 0 : (problem.columns + block - 1) / block;
  run_tasks(problem.batch * blocks, query, kernel.scratch_floats(problem, block), [&](int64_t task, float* scratch) {
    const int64_t sample = task / blocks, first = task % blocks * block;
    const int64_t count = std::min(block, length_of(sample) - first);
    if (count > 0) kernel.score(problem, sample, first, count, scratch);
  });
  run_tasks(problem.batch * problem.targets, query, 0,
            [&](int64_t row, float*) { kernel.finish(problem, row, length_of(row / problem.targets)); });
  return arguments.results();
}

}  // namespace
}  // namespace fastxai::cpu

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CPU, m) {
  m.impl("proxy_relevancy", TORCH_BOX(&fastxai::cpu::proxy_relevancy));
}
