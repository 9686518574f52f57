// What the CPU entry points share: the choice of instruction set, scratch memory, and tasks drawn by threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "row_list.h"

namespace fastxai::cpu {

#if defined(__x86_64__)
#define FASTXAI_KERNELS(name) &name##_avx512, &name##_avx2, &name##_baseline
#else
#define FASTXAI_KERNELS(name) &name##_baseline
#endif

inline bool processor_has(const char* instruction_set) {
#if defined(__x86_64__)
  if (std::strcmp(instruction_set, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  }
  if (std::strcmp(instruction_set, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return true;
}

// The first of the candidates, widest vectors first, that this processor can run: choose_kernel({FASTXAI_KERNELS(op)}).
template <typename Kernel>
const Kernel& choose_kernel(std::initializer_list<const Kernel*> candidates) {
  // Read on every call, so that a test can walk through the variants in one process.
  const char* forced = std::getenv("LVLM_FASTXAI_CPU_ISA");
  const bool free_choice = forced == nullptr || *forced == '\0';
  for (const Kernel* candidate : candidates) {
    if (free_choice ? !processor_has(candidate->name) : std::strcmp(candidate->name, forced) != 0) continue;
    STD_TORCH_CHECK(processor_has(candidate->name), "LVLM_FASTXAI_CPU_ISA=", forced,
                    ": this processor does not have it");
    return *candidate;
  }
  STD_TORCH_CHECK(false, "LVLM_FASTXAI_CPU_ISA=", forced, ": no kernel was built for it");
}

// Flat, and owned by torch, whose allocator aligns to 64 bytes and whose memory tools then see it.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, size_t floats) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(floats)});
}

// The rows of every sample that a kernel has to look at.
class RowLists {
 public:
  // Those that see a key and that wanted(sample, row) is true of. Problem: batch, queries, keys, key_start, key_end.
  template <typename Problem, typename Wanted>
  RowLists(const Problem& problem, const Wanted& wanted) {
    first_.push_back(0);
    for (int64_t b = 0; b < problem.batch; ++b) {
      for (int64_t i = 0; i < problem.queries; ++i) {
        const int64_t start = std::max<int64_t>(problem.key_start[b * problem.queries + i], 0);
        const int64_t end = std::min<int64_t>(problem.key_end[b * problem.queries + i], problem.keys);
        if (start < end && wanted(b, i)) index_.push_back(static_cast<int32_t>(i));
      }
      first_.push_back(static_cast<int64_t>(index_.size()));
    }
  }

  RowList of(int64_t sample) const { return {index_.data() + first_[sample], first_[sample + 1] - first_[sample]}; }

 private:
  std::vector<int32_t> index_;
  std::vector<int64_t> first_;
};

// Calls run(task, scratch) for every task; threads draw them one by one in ascending order, since tasks differ in cost.
template <typename Run>
void run_tasks(int64_t tasks, const torch::stable::Tensor& like, size_t scratch_floats, const Run& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const torch::stable::Tensor scratch = allocate(like, threads * scratch_floats);
  float* const memory = scratch.mutable_data_ptr<float>();
  std::atomic<int64_t> next_task{0}, next_scratch{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* const own = memory + next_scratch.fetch_add(1) * scratch_floats;
    for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task, own);
  });
}

}  // namespace fastxai::cpu
