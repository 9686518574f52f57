// What the entry point needs to know of the kernel, which is compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/relevancy_product.h"
#include "row_list.h"

namespace fastxai::cpu {

struct RelevancyProductKernel {
  const char* name;
  // Keys that one task handles.
  int64_t (*key_block)(const RelevancyProduct& problem);
  // Floats of scratch space, 64-byte aligned, that one thread needs.
  size_t (*scratch_floats)(const RelevancyProduct& problem);
  // Column sums of head `head` over the keys of block `block`, written to partial[target * keys + key]. The rows are
  // those that carry weight for at least one target and see at least one key.
  void (*run)(const RelevancyProduct& problem, const RowList& rows, int64_t sample, int64_t head, int64_t block,
              float* scratch, float* partial);
};

#if defined(__x86_64__)
extern const RelevancyProductKernel relevancy_product_avx512;
extern const RelevancyProductKernel relevancy_product_avx2;
#endif
extern const RelevancyProductKernel relevancy_product_baseline;

}  // namespace fastxai::cpu
