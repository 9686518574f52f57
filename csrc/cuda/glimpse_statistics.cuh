// Device code of glimpse_statistics, and how it is launched. Beyond the CUDA language it uses only what ptx.cuh names,
// so that a test can compile it for the host.
//
// Three kernels, of which the first runs twice, and nothing between them but the stream's order:
//   outline_tiles            what every tile of query rows sees, and what it sums over
//   glimpse_statistics_rows  one block per (rows, share of the keys, sample and target): goes through the heads for
//                            each of its tiles, so that Σ_h dP stays in registers until its magnitude is taken
//   add_statistics           adds the shares and the rows up, always in the same order: the same bits every time
#pragma once

#include <cstdint>

#include "../common/glimpse_statistics.h"
#include "shared_kernels.cuh"

namespace fastxai::cuda {

// How a problem is cut up.
struct StatisticsPlan {
  int tiles;   // of kTileRows query rows, per sample
  int splits;  // blocks that share the keys of a block of rows
  RowShape shape;
};

// Blocks that share a block of rows have consecutive numbers. So the 264 blocks that an H100 runs at a time go through
// the queries of 16 or 17 blocks of rows together, and the L2 cache serves all but the first of 16 readers. With all
// rows at once and one tile of keys, S = 32768 would read a query 512 times from device memory in place of 32.
constexpr int kLeastSplits = 16;

// Over the keys of one share, of one row of one head.
struct RowSums {
  float product;   // Σ_j max(0, P_ij·dP_ij)
  float gradient;  // Σ_j max(0, dP_ij)
};

// Which entries of a tile a thread adds up: bit c + a·kThreadRight for its row a and its key c. Every thread keeps its
// own in shared memory: from registers the compiler tests all bits ahead of the loop over the heads, and spills the
// answers.
struct Entries {
  uint64_t visible;  // of P, in row sums
  uint64_t counted;  // of dP, in gradient sums and the norm
};

// (H, S, d) of one sample.
template <typename T>
struct Heads {
  const T* data;
  int64_t head_stride, row_stride;
  int count;  // of rows

  __device__ Rows<T> rows(int head, int first) const {
    return rows_from<T>(data, head * head_stride, row_stride, first, count);
  }
};

// What a block multiplies, in this order: for each of its tiles of keys, for each head, the queries by the keys, if any
// of the rows sees any of them, and the gradients by the values.
template <typename T, int kKeys>
struct HeadSource {
  Heads<T> query, key, grad_output, value;
  int heads, group;  // heads of a key head
  int first_row;
  int seen_first, seen_last;      // keys that some of the rows see
  int first_key, last_key, step;  // of the tiles
  int head = 0;
  bool gradient = !sees(first_key);

  __device__ bool sees(int tile) const { return seen_first < tile + kKeys && seen_last > tile; }

  __device__ bool more() const { return first_key < last_key; }

  __device__ Sides<T> sides() const {
    const int key_head = head / group;
    // Returned from two places, the compiler no longer knows that these addresses are of device memory.
    Sides<T> sides{query.rows(head, first_row), key.rows(key_head, first_key)};
    if (gradient) sides = {grad_output.rows(head, first_row), value.rows(key_head, first_key)};
    return sides;
  }

  __device__ void advance() {
    if (gradient && ++head == heads) {
      head = 0;
      first_key += step;
    }
    gradient = !gradient || !sees(first_key);
  }
};

// The entries whose key lies in the range of their row.
template <typename Tiles>
__device__ inline uint64_t entries_in_range(const int32_t* starts, const int32_t* ends, int first_row, int rows,
                                            int first_key, int keys) {
  static_assert(Tiles::kThreadLeft * Tiles::kThreadRight <= 64);
  uint64_t found = 0;
#pragma unroll
  for (int a = 0; a < Tiles::kThreadLeft; ++a) {
    const int i = first_row + Tiles::left(a);
    const int start = i < rows ? starts[i] : 0, end = i < rows ? smaller(ends[i], keys) : 0;
#pragma unroll
    for (int c = 0; c < Tiles::kThreadRight; ++c) {
      const int j = first_key + Tiles::right(c);
      found |= static_cast<uint64_t>(start <= j && j < end) << (c + a * Tiles::kThreadRight);
    }
  }
  return found;
}

template <int kCount>
__device__ inline float sum_of_lanes(float value) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Grid: (splits, blocks of rows, B·N). sums: (B·N, splits, H, Sq); norms: (B·N, splits, Sq), Σ_j |Σ_h dP_ij|; every
// entry is written.
template <typename Tiles>
__global__ void __launch_bounds__(kThreads, 2)
    glimpse_statistics_rows(const GlimpseStatistics problem, const StatisticsPlan plan, const TileRange* seen_ranges,
                            const TileRange* sum_ranges, RowSums* sums, float* norms) {
  using T = typename Tiles::Element;
  constexpr int kLeft = Tiles::kThreadLeft, kRight = Tiles::kThreadRight, kLanes = Tiles::kLanesPerLeft;
  // Lanes that hold entries of the same rows share these rows' sums out among them, so every thread has one row.
  static_assert(kLeft == kLanes && Tiles::kLeft == kThreads);
  // Compiled for every architecture, launched only where there are tensor cores.
  if constexpr (Tiles::kTensorCores && !ptx::kTensorCores) return;

  const int targets = static_cast<int>(problem.targets);
  const int b = static_cast<int>(blockIdx.z) / targets, n = static_cast<int>(blockIdx.z) % targets;
  const int rows = static_cast<int>(problem.queries), keys = static_cast<int>(problem.keys);
  const int heads = static_cast<int>(problem.heads);
  // The last rows come first: in the causal domain they sum over most.
  const int first_row = static_cast<int>(gridDim.y - 1 - blockIdx.y) * Tiles::kLeft;
  const int first_tile = first_row / kTileRows, last_tile = smaller(first_tile + Tiles::kLeft / kTileRows, plan.tiles);
  const TileRange seen = join_tiles(seen_ranges + static_cast<int64_t>(b) * plan.tiles, first_tile, last_tile, keys);
  const TileRange summed = join_tiles(sum_ranges + static_cast<int64_t>(b) * plan.tiles, first_tile, last_tile, keys);
  const int first_key = (summed.first / Tiles::kRight + static_cast<int>(blockIdx.x)) * Tiles::kRight;

  const int own = lane() % kLanes, own_row = first_row + Tiles::left(own);
  const int64_t share = static_cast<int64_t>(blockIdx.z) * plan.splits + blockIdx.x;
  RowSums* const own_sums = sums + share * heads * rows + own_row;
  if (own_row < rows) {
    for (int h = 0; h < heads; ++h) own_sums[static_cast<int64_t>(h) * rows] = {};
  }

  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& own_entries = reinterpret_cast<Entries*>(shared_memory + Tiles::kSharedBytes)[threadIdx.x];
  const int step = plan.splits * Tiles::kRight;
  const auto heads_of = [&](const void* tensor, const int64_t (&stride)[3], int count) {
    return Heads<T>{static_cast<const T*>(tensor) + b * stride[0], stride[1], stride[2], count};
  };
  HeadSource<T, Tiles::kRight> source{
      heads_of(problem.query, problem.query_stride, rows),
      heads_of(problem.key, problem.key_stride, keys),
      {static_cast<const T*>(problem.grad_output) + b * problem.grad_stride[0] + n * problem.grad_stride[1],
       problem.grad_stride[2], problem.grad_stride[3], rows},
      heads_of(problem.value, problem.value_stride, keys),
      heads,
      static_cast<int>(problem.heads / problem.key_heads),
      first_row,
      seen.first,
      seen.last,
      first_key,
      summed.last,
      step};
  Tiles tiles(shared_memory, plan.shape, source);
  const float scale = problem.scale * kLog2E;
  float norm = 0.0f;

  for (int key = first_key; key < summed.last; key += step) {
    const bool sees = source.sees(key);
    const auto in_range = [&](const int32_t* starts, const int32_t* ends) {
      return entries_in_range<Tiles>(starts + b * problem.queries, ends + b * problem.queries, first_row, rows, key,
                                     keys);
    };
    own_entries = {sees ? in_range(problem.key_start, problem.key_end) : 0,
                   in_range(problem.sum_start, problem.sum_end)};
    float total[kLeft][kRight] = {};

    for (int h = 0; h < heads; ++h) {
      float probability[kLeft][kRight] = {}, gradient[kLeft][kRight] = {};
      if (sees) {
        tiles.multiply(source, probability);
        const float* const logsumexp = problem.logsumexp + (b * problem.heads + h) * problem.queries;
#pragma unroll
        for (int a = 0; a < kLeft; ++a) {
          const int i = first_row + Tiles::left(a);
          const float shift = i < rows ? logsumexp[i] * -kLog2E : 0.0f;
#pragma unroll
          for (int c = 0; c < kRight; ++c) probability[a][c] = ptx::exp2(fmaf(probability[a][c], scale, shift));
        }
      }
      tiles.multiply(source, gradient);
      const uint64_t visible = own_entries.visible, counted = own_entries.counted;
      RowSums* const own_sum = own_sums + static_cast<int64_t>(h) * rows;
      RowSums sum = own_row < rows ? *own_sum : RowSums{};
#pragma unroll
      for (int a = 0; a < kLeft; ++a) {
        RowSums added{};
#pragma unroll
        for (int c = 0; c < kRight; ++c) {
          const int bit = c + a * kRight;
          const float product = added.product + ptx::rectified(probability[a][c] * gradient[a][c]);
          const float positive = added.gradient + ptx::rectified(gradient[a][c]);
          added.product = visible >> bit & 1 ? product : added.product;
          added.gradient = counted >> bit & 1 ? positive : added.gradient;
          total[a][c] += gradient[a][c];
        }
        added = {sum_of_lanes<kLanes>(added.product), sum_of_lanes<kLanes>(added.gradient)};
        if (a == own) sum = {sum.product + added.product, sum.gradient + added.gradient};
      }
      if (own_row < rows) *own_sum = sum;
    }

#pragma unroll
    for (int a = 0; a < kLeft; ++a) {
      float added = 0.0f;
#pragma unroll
      for (int c = 0; c < kRight; ++c) {
        const float magnitude = added + fabsf(total[a][c]);
        added = own_entries.counted >> (c + a * kRight) & 1 ? magnitude : added;
      }
      added = sum_of_lanes<kLanes>(added);
      if (a == own) norm += added;
    }
  }
  if (own_row < rows) norms[share * rows + own_row] = norm;
}

// Grid: (H + 1, B·N). Block h adds up head h, and its rows; the last one the norm.
static __global__ void add_statistics(const GlimpseStatistics problem, int splits, const RowSums* sums,
                                      const float* norms) {
  const int64_t of_target = blockIdx.y, h = blockIdx.x, rows = problem.queries;
  const bool of_norm = h == problem.heads;
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    RowSums sum{};
#pragma unroll 8
    for (int64_t share = of_target * splits; share < (of_target + 1) * splits; ++share) {
      const RowSums added =
          of_norm ? RowSums{0.0f, norms[share * rows + i]} : sums[(share * problem.heads + h) * rows + i];
      sum = {sum.product + added.product, sum.gradient + added.gradient};
    }
    if (!of_norm) problem.row_sums[(of_target * problem.heads + h) * rows + i] = sum.product;
    total += sum.gradient;
  }
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto* const of_warps = reinterpret_cast<float*>(shared_memory);
  total = sum_of_lanes<32>(total);
  if (lane() == 0) of_warps[warp()] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += of_warps[w];
  *(of_norm ? problem.norm + of_target : problem.gradient_sums + of_target * problem.heads + h) = total;
}

inline StatisticsPlan make_plan(const GlimpseStatistics& problem, const Device& device) {
  StatisticsPlan plan;
  plan.tiles = static_cast<int>(blocks(problem.queries, kTileRows));
  // More splits where there are few rows, until every multiprocessor has about four blocks. The number of targets has
  // no say, so that it changes no bit of the results.
  const int64_t unsplit = blocks(problem.queries, 128) * problem.batch, most = blocks(problem.keys, 64);
  const int64_t wanted = unsplit > 0 ? blocks(4 * device.multiprocessors, unsplit) : 0;
  const int64_t splits = wanted > kLeastSplits ? wanted : kLeastSplits;
  plan.splits = static_cast<int>(splits < most ? splits : most);
  if (plan.splits < 1) plan.splits = 1;
  plan.shape = row_shape(problem);
  return plan;
}

inline int64_t tile_range_count(const GlimpseStatistics& problem, const StatisticsPlan& plan) {
  return 2 * problem.batch * plan.tiles;
}
inline int64_t norm_count(const GlimpseStatistics& problem, const StatisticsPlan& plan) {
  return problem.batch * problem.targets * plan.splits * problem.queries;
}
inline int64_t sum_count(const GlimpseStatistics& problem, const StatisticsPlan& plan) {
  return norm_count(problem, plan) * problem.heads;
}

// Shared memory of a block of glimpse_statistics_rows.
template <typename Tiles>
constexpr int statistics_bytes() {
  return Tiles::kSharedBytes + kThreads * static_cast<int>(sizeof(Entries));
}

template <typename Tiles, typename Launch>
void launch_rows(const GlimpseStatistics& problem, const StatisticsPlan& plan, const TileRange* seen_ranges,
                 const TileRange* sum_ranges, RowSums* sums, float* norms, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(blocks(problem.queries, Tiles::kLeft)),
                  static_cast<unsigned>(problem.batch * problem.targets));
  launch(glimpse_statistics_rows<Tiles>, grid, statistics_bytes<Tiles>(), problem, plan, seen_ranges, sum_ranges, sums,
         norms);
}

template <typename T, typename Launch>
void launch_rows_16_bit(const GlimpseStatistics& problem, const StatisticsPlan& plan, bool tensor_cores,
                        const TileRange* seen_ranges, const TileRange* sum_ranges, RowSums* sums, float* norms,
                        const Launch& launch) {
  if (tensor_cores) {
    launch_rows<TensorCoreSides<T>>(problem, plan, seen_ranges, sum_ranges, sums, norms, launch);
  } else {
    launch_rows<FmaSides<T>>(problem, plan, seen_ranges, sum_ranges, sums, norms, launch);
  }
}

// Calls launch(kernel, grid, bytes of shared memory, arguments…) for each kernel that has anything to do.
template <typename Launch>
void launch_kernels(const GlimpseStatistics& problem, const StatisticsPlan& plan, const Device& device,
                    TileRange* ranges, RowSums* sums, float* norms, const Launch& launch) {
  if (problem.queries > 0) {
    TileRange* const sum_ranges = ranges + problem.batch * plan.tiles;
    const auto outline = [&](const int32_t* starts, const int32_t* ends, TileRange* to) {
      const dim3 grid(static_cast<unsigned>(blocks(plan.tiles, kWarps)), static_cast<unsigned>(problem.batch), 1);
      launch(outline_tiles, grid, 0, starts, ends, static_cast<const float*>(nullptr), problem.targets, problem.queries,
             problem.keys, plan.tiles, to);
    };
    outline(problem.key_start, problem.key_end, ranges);
    outline(problem.sum_start, problem.sum_end, sum_ranges);
    switch (problem.element) {
      case Element::kFloat32:
        launch_rows<FmaSides<float>>(problem, plan, ranges, sum_ranges, sums, norms, launch);
        break;
      case Element::kBFloat16:
        launch_rows_16_bit<BFloat16>(problem, plan, device.tensor_cores, ranges, sum_ranges, sums, norms, launch);
        break;
      case Element::kFloat16:
        launch_rows_16_bit<Float16>(problem, plan, device.tensor_cores, ranges, sum_ranges, sums, norms, launch);
        break;
    }
  }
  launch(add_statistics,
         dim3(static_cast<unsigned>(problem.heads + 1), static_cast<unsigned>(problem.batch * problem.targets), 1),
         kWarps * static_cast<int>(sizeof(float)), problem, plan.splits, sums, norms);
}

}  // namespace fastxai::cuda
