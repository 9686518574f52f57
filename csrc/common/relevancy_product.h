// The problem that every backend of relevancy_product solves. No torch types: kernels compile without torch headers.
#pragma once

#include "element.h"

namespace fastxai {

// result[b, n, j] = Σ_i row[b, n, i] · (1/H) Σ_h max(0, exp(scale·q_i·k_j − logsumexp_i) · (dO_i·v_j))
// over the rows i with key_start[b, i] <= j < key_end[b, i]. Rows of weight zero contribute nothing.
struct RelevancyProduct {
  Element element;           // of query, key, value and grad_output; everything else is float32
  const void* query;         // (B, H, Sq, d)
  const void* key;           // (B, Hkv, Sk, d)
  const void* value;         // (B, Hkv, Sk, d)
  const void* grad_output;   // (B, N or 1, H, Sq, d)
  const float* logsumexp;    // (B, H, Sq) contiguous
  const float* row;          // (B, N, Sq) contiguous
  const int32_t* key_start;  // (B, Sq) contiguous
  const int32_t* key_end;    // (B, Sq) contiguous
  float* result;             // (B, N, Sk) contiguous
  int64_t batch, targets, grad_targets, heads, key_heads, queries, keys, width;
  // In elements; the last axis is contiguous.
  int64_t query_stride[3], key_stride[3], value_stride[3], grad_stride[4];
  float scale;
};

}  // namespace fastxai
