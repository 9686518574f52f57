// The problem that every backend of proxy_relevancy solves. No torch types: kernels compile without torch headers.
#pragma once

#include "element.h"

namespace fastxai {

// Column j < lengths[b] of sample b, with μ_j the mean of its D states, or 0 unless centered, and
// σ_j² = mean((x_j − μ_j)²) + eps:
//   s_j = ((x_j − μ_j) · query[b, n]) / σ_j + offset[b, n],
//   map[b, n, j] = m_j = sigmoid(s_j), or softmax over the columns; 0 from lengths[b] on, where hidden is not read,
//   entropy[b, n] = −Σ_j p_j log p_j / log lengths[b] with p = m / Σ m; 0 where there is at most one column, and
//   bernoulli[b, n] = −mean_j (m_j log m_j + (1 − m_j) log(1 − m_j)) / log 2; 0 where there is no column.
struct ProxyRelevancy {
  Element element;         // of hidden; everything else is float32
  const void* hidden;      // (B, S, D)
  const float* query;      // (B, N, D) contiguous
  const float* offset;     // (B, N) contiguous
  const int32_t* lengths;  // (B,) contiguous; kernels clamp it to 0 … S
  float* map;              // (B, N, S) contiguous
  float* entropy;          // (B, N) contiguous
  float* bernoulli;        // (B, N) contiguous
  int64_t batch, columns, targets, width;
  int64_t hidden_stride[2];  // in elements; the last axis is contiguous
  float eps;
  bool centered, softmax;
};

}  // namespace fastxai
