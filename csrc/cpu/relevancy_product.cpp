// CPU entry point: picks the instruction set, hands (sample, head, key block) tasks to threads, adds the heads up.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../common/relevancy_product_arguments.h"
#include "relevancy_product_kernel.h"

namespace fastxai::cpu {
namespace {

struct Candidate {
  const RelevancyProductKernel* kernel;
  bool usable;
};

const RelevancyProductKernel& choose_kernel() {
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&relevancy_product_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                      __builtin_cpu_supports("fma")},
      {&relevancy_product_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&relevancy_product_baseline, true},
  };
  // Read on every call, so that a test can walk through the variants in one process.
  const char* forced = std::getenv("LVLM_FASTXAI_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (const Candidate& candidate : candidates) {
      if (candidate.usable) return *candidate.kernel;
    }
  }
  for (const Candidate& candidate : candidates) {
    if (std::strcmp(candidate.kernel->name, forced) != 0) continue;
    STD_TORCH_CHECK(candidate.usable, "LVLM_FASTXAI_CPU_ISA=", forced, ": this processor does not have it");
    return *candidate.kernel;
  }
  STD_TORCH_CHECK(false, "LVLM_FASTXAI_CPU_ISA=", forced, ": no kernel was built for it");
}

// Flat, and owned by torch, whose allocator aligns to 64 bytes and whose memory tools then see it.
Tensor allocate(const Tensor& like, size_t floats) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(floats)});
}

// Active rows of every sample, and where each sample's begin.
struct RowLists {
  std::vector<int32_t> index;
  std::vector<int64_t> first;
};

RowLists find_active_rows(const RelevancyProduct& problem) {
  RowLists lists;
  lists.first.push_back(0);
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < problem.queries; ++i) {
      const int64_t start = problem.key_start[b * problem.queries + i];
      const int64_t end = problem.key_end[b * problem.queries + i];
      if ((start < 0 ? 0 : start) >= (end > problem.keys ? problem.keys : end)) continue;
      for (int64_t n = 0; n < problem.targets; ++n) {
        if (problem.row[(b * problem.targets + n) * problem.queries + i] != 0.0f) {
          lists.index.push_back(static_cast<int32_t>(i));
          break;
        }
      }
    }
    lists.first.push_back(static_cast<int64_t>(lists.index.size()));
  }
  return lists;
}

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
  const RelevancyProductKernel& kernel = choose_kernel();
  const RowLists lists = find_active_rows(problem);

  const int64_t columns = problem.targets * problem.keys;
  const int64_t heads = problem.batch * problem.heads;
  const int64_t block = kernel.key_block(problem);
  const int64_t blocks = (problem.keys + block - 1) / block;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), heads * blocks);
  const size_t scratch_floats = kernel.scratch_floats(problem);
  const Tensor partial = allocate(row, heads * columns);
  const Tensor scratch = allocate(row, threads * scratch_floats);
  float* partial_data = partial.mutable_data_ptr<float>();
  float* scratch_data = scratch.mutable_data_ptr<float>();

  std::atomic<int64_t> next_task{0}, next_scratch{0};
  // Tasks differ in cost (a causal mask leaves few rows to the last keys), so threads draw them one by one. The blocks
  // of a head follow each other while its query and grad_output rows are still in the cache.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* own_scratch = scratch_data + next_scratch.fetch_add(1) * scratch_floats;
    for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < heads * blocks;) {
      const int64_t sample = task / blocks / problem.heads;
      const int64_t head = task / blocks % problem.heads;
      const ActiveRows rows{lists.index.data() + lists.first[sample], lists.first[sample + 1] - lists.first[sample]};
      kernel.run(problem, rows, sample, head, task % blocks, own_scratch, partial_data + task / blocks * columns);
    }
  });
  average_heads(problem, partial_data);
  return arguments.result;
}

}  // namespace
}  // namespace fastxai::cpu

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CPU, m) {
  m.impl("relevancy_product", TORCH_BOX(&fastxai::cpu::relevancy_product));
}
