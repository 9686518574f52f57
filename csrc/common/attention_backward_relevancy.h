// The problem that every backend of attention_backward_relevancy solves. No torch types: kernels compile without torch
// headers.
#pragma once

#include "element.h"

namespace fastxai {

// With P_ij = exp(scale·q_i·k_j − logsumexp_i) over the keys key_start[b, i] <= j < key_end[b, i] of row i, zero
// elsewhere, dP_ij = dO_i·v_j, D_i = dO_i·O_i and dS = P ∘ (dP − D), for every target:
//   grad_query = scale·dS·K, grad_key = scale·dSᵀ·Q, grad_value = Pᵀ·dO (both summed over the heads of a key head) and
//   product[b, n, j] = Σ_i row[b, n, i] · (1/H) Σ_h max(0, P_ij·dP_ij), to which rows of weight zero add nothing.
struct AttentionBackwardRelevancy {
  Element element;           // of query, key, value, output, grad_output and their gradients; the rest is float32
  const void* query;         // (B, H, Sq, d)
  const void* key;           // (B, Hkv, Sk, d)
  const void* value;         // (B, Hkv, Sk, d)
  const void* output;        // (B, H, Sq, d)
  const void* grad_output;   // (B, N, H, Sq, d)
  const float* logsumexp;    // (B, H, Sq) contiguous
  const float* row;          // (B, N, Sq) contiguous
  const int32_t* key_start;  // (B, Sq) contiguous
  const int32_t* key_end;    // (B, Sq) contiguous
  void* grad_query;          // (B, N, H, Sq, d) contiguous
  void* grad_key;            // (B, N, Hkv, Sk, d) contiguous
  void* grad_value;          // (B, N, Hkv, Sk, d) contiguous
  float* product;            // (B, N, Sk) contiguous
  int64_t batch, targets, heads, key_heads, queries, keys, width;
  // In elements; the last axis is contiguous.
  int64_t query_stride[3], key_stride[3], value_stride[3], output_stride[3], grad_stride[4];
  float scale;
};

}  // namespace fastxai
