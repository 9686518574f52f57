// What the entry point needs to know of the kernel, which is compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/glimpse_statistics.h"
#include "row_list.h"

namespace fastxai::cpu {

// One share of the work: a block of rows against the key blocks first_block, first_block + block_step, …
struct StatisticsTask {
  int64_t sample, target;
  RowList rows;  // at most row_block
  int64_t first_block, block_step;
};

struct GlimpseStatisticsKernel {
  const char* name;
  // Rows and keys that are handled at once.
  int64_t row_block, key_block;
  // Floats of scratch space, 64-byte aligned, that one thread needs.
  size_t (*scratch_floats)(const GlimpseStatistics& problem);
  // Writes what the task's rows and keys give: row_sums (H, row_block), of which the task's rows count, and sums, the H
  // sums of positive gradients followed by the norm.
  void (*run)(const GlimpseStatistics& problem, const StatisticsTask& task, float* scratch, float* row_sums,
              double* sums);
};

#if defined(__x86_64__)
extern const GlimpseStatisticsKernel glimpse_statistics_avx512;
extern const GlimpseStatisticsKernel glimpse_statistics_avx2;
#endif
extern const GlimpseStatisticsKernel glimpse_statistics_baseline;

}  // namespace fastxai::cpu
