// What the entry point needs to know of the kernel, which is compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/proxy_relevancy.h"

namespace fastxai::cpu {

struct ProxyRelevancyKernel {
  const char* name;
  // Columns that one task handles; what becomes of a column does not depend on it.
  int64_t (*column_block)(const ProxyRelevancy& problem, int64_t threads);
  // Floats of scratch space, 64-byte aligned, that one thread needs.
  size_t (*scratch_floats)(const ProxyRelevancy& problem, int64_t block);
  // Writes the scores of `count` columns of a sample from `first` on, for every target, to the map.
  void (*score)(const ProxyRelevancy& problem, int64_t sample, int64_t first, int64_t count, float* scratch);
  // Turns the scores of the first `length` columns of row `row` of (B, N) into its map and its entropies.
  void (*finish)(const ProxyRelevancy& problem, int64_t row, int64_t length);
};

#if defined(__x86_64__)
extern const ProxyRelevancyKernel proxy_relevancy_avx512;
extern const ProxyRelevancyKernel proxy_relevancy_avx2;
#endif
extern const ProxyRelevancyKernel proxy_relevancy_baseline;

}  // namespace fastxai::cpu
