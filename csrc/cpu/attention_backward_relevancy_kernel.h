// What the entry point needs to know of the kernel, which is compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/attention_backward_relevancy.h"
#include "row_list.h"

namespace fastxai::cpu {

// One share of the work: the key blocks first_block, first_block + block_step, … of a key head, for one target.
struct BackwardTask {
  int64_t sample, target, key_head, first_block, block_step;
};

struct AttentionBackwardRelevancyKernel {
  const char* name;
  // Keys that are handled at once.
  int64_t key_block;
  // Floats of scratch space, 64-byte aligned, that one thread needs.
  size_t (*scratch_floats)(const AttentionBackwardRelevancy& problem);
  // Floats from one row of grad_query's shares to the next.
  int64_t (*row_pitch)(const AttentionBackwardRelevancy& problem);
  // Writes grad_key, grad_value and the sum over the task's query heads of the product (Sk) at the task's keys, and its
  // share of grad_query (heads per key head, Sq, row pitch).
  void (*run)(const AttentionBackwardRelevancy& problem, const RowList& rows, const BackwardTask& task, float* scratch,
              float* grad_query, float* product);
  // Adds up the shares of grad_query, share_stride floats apart, of one head: `head` counts samples, targets and heads.
  void (*add_shares)(const AttentionBackwardRelevancy& problem, int64_t head, const float* shares, int64_t share_stride,
                     int64_t count);
};

#if defined(__x86_64__)
extern const AttentionBackwardRelevancyKernel attention_backward_relevancy_avx512;
extern const AttentionBackwardRelevancyKernel attention_backward_relevancy_avx2;
#endif
extern const AttentionBackwardRelevancyKernel attention_backward_relevancy_baseline;

}  // namespace fastxai::cpu
