// CPU entry point: picks the instruction set, hands (sample, head, key block) tasks to threads, adds the heads up.

#include <torch/csrc/stable/library.h>

#include "../common/relevancy_product_arguments.h"
#include "relevancy_product_kernel.h"
#include "threads.h"

namespace fastxai::cpu {
namespace {

// Heads are added in ascending order, so the result does not depend on which thread did what.
void average_heads(const RelevancyProduct& problem, const float* partial) {
  const int64_t columns = problem.targets * problem.keys;
  const float share = 1.0f / static_cast<float>(problem.heads);
  for (int64_t b = 0; b < problem.batch; ++b) {
    float* result = problem.result + b * columns;
    for (int64_t c = 0; c < columns; ++c) result[c] = 0.0f;
    for (int64_t h = 0; h < problem.heads; ++h) {
      const float* head = partial + (b * problem.heads + h) * columns;
      for (int64_t c = 0; c < columns; ++c) result[c] += head[c];
    }
    for (int64_t c = 0; c < columns; ++c) result[c] *= share;
  }
}

Tensor relevancy_product(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor row,
                         Tensor key_start, Tensor key_end, double scale) {
  const RelevancyProductArguments arguments =
      describe(query, key, value, grad_output, logsumexp, row, key_start, key_end, scale);
  const RelevancyProduct& problem = arguments.problem;
  const auto& kernel = choose_kernel({FASTXAI_KERNELS(relevancy_product)});
  const RowLists lists(problem, [&](int64_t b, int64_t i) {
    for (int64_t n = 0; n < problem.targets; ++n) {
      if (problem.row[(b * problem.targets + n) * problem.queries + i] != 0.0f) return true;
    }
    return false;
  });

  const int64_t columns = problem.targets * problem.keys;
  const int64_t heads = problem.batch * problem.heads;
  const int64_t block = kernel.key_block(problem);
  const int64_t blocks = (problem.keys + block - 1) / block;
  const Tensor partial = allocate(row, heads * columns);
  float* partial_data = partial.mutable_data_ptr<float>();
  // The blocks of a head follow each other while its query and grad_output rows are still in the cache.
  run_tasks(heads * blocks, row, kernel.scratch_floats(problem), [&](int64_t task, float* scratch) {
    const int64_t sample = task / blocks / problem.heads, head = task / blocks % problem.heads;
    kernel.run(problem, lists.of(sample), sample, head, task % blocks, scratch, partial_data + task / blocks * columns);
  });
  average_heads(problem, partial_data);
  return arguments.result;
}

}  // namespace
}  // namespace fastxai::cpu

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CPU, m) {
  m.impl("relevancy_product", TORCH_BOX(&fastxai::cpu::relevancy_product));
}
