// The kernels and the parts of kernels that operators share: what tiles of query rows see, and the sum over heads.
// Kernels are static: every operator's library of machine code has its own.
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "tiles.cuh"

namespace fastxai::cuda {

// What the rows of a tile see together. Rows that contribute nothing, to no target, do not count for the union; rows
// that do not contribute to every target leave the intersection empty.
struct TileRange {
  int32_t first, last;                // union of the rows' key ranges
  int32_t common_first, common_last;  // their intersection
};

// A block lists the tiles it visits in shared memory, which bounds their number.
constexpr int kMaxListed = 2048;
constexpr float kLog2E = 1.44269504f;

// Grid: (groups of kWarps tiles, B). One warp per tile, one lane per row. row: (B, N, Sq), the weights without which a
// row does not contribute; nullptr when every row does.
static __global__ void outline_tiles(const int32_t* key_start, const int32_t* key_end, const float* row,
                                     int64_t targets, int64_t queries, int64_t all_keys, int tiles, TileRange* ranges) {
  const int tile = static_cast<int>(blockIdx.x) * kWarps + warp();
  const int64_t b = blockIdx.y, i = static_cast<int64_t>(tile) * kTileRows + lane();
  const int keys = static_cast<int>(all_keys);
  bool any = false, every = i < queries;
  int start = 0, end = 0;
  if (i < queries) {
    start = larger(key_start[b * queries + i], 0);
    end = smaller(key_end[b * queries + i], keys);
    any = row == nullptr;
    for (int64_t n = 0; row != nullptr && n < targets; ++n) {
      const bool contributes = row[(b * targets + n) * queries + i] != 0.0f;
      any = any || contributes;
      every = every && contributes;
    }
  }
  any = any && start < end;
  TileRange range{any ? start : keys, any ? end : 0, every ? start : keys, every ? end : 0};
  for (int step = 16; step > 0; step /= 2) {
    range.first = smaller(range.first, __shfl_xor_sync(~0u, range.first, step));
    range.last = larger(range.last, __shfl_xor_sync(~0u, range.last, step));
    range.common_first = larger(range.common_first, __shfl_xor_sync(~0u, range.common_first, step));
    range.common_last = smaller(range.common_last, __shfl_xor_sync(~0u, range.common_last, step));
  }
  if (lane() == 0 && tile < tiles) ranges[b * tiles + tile] = range;
}

// What the rows of the tiles first … last − 1 see together.
__device__ inline TileRange join_tiles(const TileRange* ranges, int first, int last, int keys) {
  TileRange range{keys, 0, 0, keys};
  for (int tile = first; tile < last; ++tile) {
    const TileRange own = ranges[tile];
    range.first = smaller(range.first, own.first);
    range.last = larger(range.last, own.last);
    range.common_first = larger(range.common_first, own.common_first);
    range.common_last = smaller(range.common_last, own.common_last);
  }
  return range;
}

// Lists which of the tiles first, first + step, … < last some of the block's keys are seen from: 2·tile, + 1 when every
// row of the tile sees them all. The first warp does it, 32 tiles at a time; the others wait at the barrier.
__device__ inline int list_tiles(const TileRange* ranges, int first, int step, int last, int first_key, int last_key,
                                 int* list, int* count) {
  if (warp() == 0) {
    int found = 0;
    for (int before = first; before < last; before += 32 * step) {
      const int tile = before + lane() * step;
      const TileRange range = tile < last ? ranges[tile] : TileRange{};
      const bool seen = range.first < last_key && range.last > first_key;
      const unsigned votes = __ballot_sync(~0u, seen);
      const bool all = range.common_first <= first_key && range.common_last >= last_key;
      if (seen) list[found + __popc(votes & ((1u << lane()) - 1))] = 2 * tile + (all ? 1 : 0);
      found += __popc(votes);
    }
    if (lane() == 0) *count = found;
  }
  __syncthreads();
  return *count;
}

// result[b, c] = Σ_part partial[b, part, c] / heads, always added in the same order. Grid: (blocks of columns, B).
static __global__ void average_heads(const float* partial, float* result, int64_t parts, int64_t columns,
                                     int64_t heads) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = blockIdx.y;
  if (column >= columns) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += partial[(b * parts + part) * columns + column];
  result[b * columns + column] = sum / static_cast<float>(heads);
}

// What of a device matters here.
struct Device {
  int multiprocessors;
  bool tensor_cores;
};

inline int64_t blocks(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

inline int64_t bytes_of(Element element) {
  return element == Element::kFloat32 ? 4 : 2;
}

inline bool starts_aligned(const void* data, const int64_t* stride, int axes, int64_t element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int axis = 0; axis < axes; ++axis) aligned = aligned && stride[axis] * element_bytes % 16 == 0;
  return aligned;
}

// Of the matrices that every operator multiplies.
template <typename Problem>
RowShape row_shape(const Problem& problem) {
  const int64_t bytes = bytes_of(problem.element);
  return {static_cast<int>(problem.width), starts_aligned(problem.query, problem.query_stride, 3, bytes) &&
                                               starts_aligned(problem.key, problem.key_stride, 3, bytes) &&
                                               starts_aligned(problem.value, problem.value_stride, 3, bytes) &&
                                               starts_aligned(problem.grad_output, problem.grad_stride, 4, bytes)};
}

}  // namespace fastxai::cuda
