// What the entry point needs to know of the kernel, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../common/proxy_relevancy.h"

namespace fastxai::cpu {

struct ProxyRelevancyKernel {
  const char* name;
  // Columns that one task handles.
  int64_t (*column_block)(const ProxyRelevancy& problem);
  // Writes the scores of `count` columns of a sample from `first` on, for every target, to the map.
  void (*score)(const ProxyRelevancy& problem, int64_t sample, int64_t first, int64_t count);
  // Turns the scores of the first `length` columns of row `row` of (B, N) into its map and its entropies.
  void (*finish)(const ProxyRelevancy& problem, int64_t row, int64_t length);
};

#if defined(__x86_64__)
extern const ProxyRelevancyKernel proxy_relevancy_avx512;
extern const ProxyRelevancyKernel proxy_relevancy_avx2;
#endif
extern const ProxyRelevancyKernel proxy_relevancy_baseline;

}  // namespace fastxai::cpu
