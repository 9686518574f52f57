// The problem that every backend of glimpse_statistics solves. No torch types: kernels compile without torch headers.
#pragma once

#include "element.h"

namespace fastxai {

// With P_ij = exp(scale·q_i·k_j − logsumexp_i) over the keys key_start[b, i] <= j < key_end[b, i] of row i, zero
// elsewhere, and dP_ij = dO_i·v_j over the keys sum_start[b, i] <= j < sum_end[b, i], among which are those that the
// row sees, zero elsewhere, for every target:
//   row_sums[b, n, h, i] = Σ_j max(0, P_ij·dP_ij) of head h,
//   gradient_sums[b, n, h] = Σ_ij max(0, dP_ij) of head h and
//   norm[b, n] = Σ_ij |Σ_h dP_ij|.
struct GlimpseStatistics {
  Element element;           // of query, key, value and grad_output; everything else is float32
  const void* query;         // (B, H, Sq, d)
  const void* key;           // (B, Hkv, Sk, d)
  const void* value;         // (B, Hkv, Sk, d)
  const void* grad_output;   // (B, N, H, Sq, d)
  const float* logsumexp;    // (B, H, Sq) contiguous
  const int32_t* key_start;  // (B, Sq) contiguous, like the three that follow
  const int32_t* key_end;
  const int32_t* sum_start;
  const int32_t* sum_end;
  float* row_sums;       // (B, N, H, Sq) contiguous
  float* gradient_sums;  // (B, N, H) contiguous
  float* norm;           // (B, N) contiguous
  int64_t batch, targets, heads, key_heads, queries, keys, width;
  // In elements; the last axis is contiguous.
  int64_t query_stride[3], key_stride[3], value_stride[3], grad_stride[4];
  float scale;
};

}  // namespace fastxai
