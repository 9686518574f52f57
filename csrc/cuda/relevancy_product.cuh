// Device code of relevancy_product. It uses nothing beyond the CUDA language, so that a test can compile it for the
// host.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/relevancy_product.h"

namespace fastxai::cuda {

constexpr int kThreads = 128;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(BFloat16 value) {
  return from_bits(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_float(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude << 13));
  // The product restores the exponent's bias and normalises subnormals.
  const float absolute = from_bits(magnitude << 13) * 0x1p112f;
  return sign != 0 ? -absolute : absolute;
}

template <typename T>
__device__ inline float dot(const T* a, const T* b, int64_t width) {
  float sum = 0.0f;
  for (int64_t k = 0; k < width; ++k) sum += to_float(a[k]) * to_float(b[k]);
  return sum;
}

// Column sums of one head. Each thread owns one key and walks over the query rows that see it; the result needs neither
// atomics nor a fixed order of blocks. Grid: (key blocks, H, B). partial: (B, H, N, Sk), zero on entry.
// This is the plain version for every architecture; it uses no tensor cores.
template <typename T>
__global__ void relevancy_product_columns(RelevancyProduct problem, float* partial) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t h = blockIdx.y, b = blockIdx.z;
  if (j >= problem.keys) return;
  const int64_t key_head = h / (problem.heads / problem.key_heads);
  const T* key = static_cast<const T*>(problem.key) + b * problem.key_stride[0] + key_head * problem.key_stride[1] +
                 j * problem.key_stride[2];
  const T* value = static_cast<const T*>(problem.value) + b * problem.value_stride[0] +
                   key_head * problem.value_stride[1] + j * problem.value_stride[2];
  const T* query = static_cast<const T*>(problem.query) + b * problem.query_stride[0] + h * problem.query_stride[1];
  const T* grad_output =
      static_cast<const T*>(problem.grad_output) + b * problem.grad_stride[0] + h * problem.grad_stride[2];
  const float* logsumexp = problem.logsumexp + (b * problem.heads + h) * problem.queries;
  const float* row = problem.row + b * problem.targets * problem.queries;
  float* sums = partial + (b * problem.heads + h) * problem.targets * problem.keys + j;

  for (int64_t i = 0; i < problem.queries; ++i) {
    if (j < problem.key_start[b * problem.queries + i] || j >= problem.key_end[b * problem.queries + i]) continue;
    bool known = false;  // probability and product are computed for the first target of non-zero weight
    float probability = 0.0f, product = 0.0f;
    for (int64_t n = 0; n < problem.targets; ++n) {
      const float weight = row[n * problem.queries + i];
      if (weight == 0.0f) continue;
      if (!known)
        probability = expf(problem.scale * dot(query + i * problem.query_stride[2], key, problem.width) - logsumexp[i]);
      if (!known || problem.grad_targets > 1) {
        const int64_t gradient = problem.grad_targets > 1 ? n : 0;
        const T* grad_row = grad_output + gradient * problem.grad_stride[1] + i * problem.grad_stride[3];
        product = probability * dot(grad_row, value, problem.width);
        product = product < 0.0f ? 0.0f : product;  // keeps NaN, as torch.clamp does
      }
      known = true;
      sums[n * problem.keys] += weight * product;
    }
  }
}

// result[b, n, j] = mean over heads of partial[b, h, n, j]. Grid: (blocks of N·Sk columns, B).
__global__ void average_heads(RelevancyProduct problem, const float* partial) {
  const int64_t columns = problem.targets * problem.keys;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = blockIdx.y;
  if (column >= columns) return;
  float sum = 0.0f;
  for (int64_t h = 0; h < problem.heads; ++h) sum += partial[(b * problem.heads + h) * columns + column];
  problem.result[b * columns + column] = sum / static_cast<float>(problem.heads);
}

}  // namespace fastxai::cuda
