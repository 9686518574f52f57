// Device code of attention_backward_relevancy, and how it is launched. Beyond the CUDA language it uses only what
// ptx.cuh names, so that a test can compile it for the host.
//
// Five kernels, and nothing between them but the stream's order:
//   outline_tiles    what every tile of query rows sees, so that tiles that see nothing are passed over
//   state_rows       what is known of every row of every head and target, D = dO·O among it
//   backward_keys    one block per (keys, key head, target): dK, dV and the product's column sums, over all rows of all
//                    query heads of the key head, so that nothing is left to be added up but the product's key heads
//   backward_rows    one block per (rows, head, target): dQ
//   average_heads    adds the product's key heads up, always in the same order: no atomics, the same bits every time
#pragma once

#include <cstdint>

#include "../common/attention_backward_relevancy.h"
#include "paired_tiles.cuh"
#include "shared_kernels.cuh"

namespace fastxai::cuda {

// How a problem is cut up.
struct BackwardPlan {
  int tiles;  // of kTileRows query rows, per sample
  RowShape shape;
};

template <typename T>
__device__ inline Rows<T> moved(const Rows<T>& rows, int first) {
  return {rows.data + first * rows.stride, rows.stride, rows.count - first};
}

// states: (B, N, H, Sq). Grid: (groups of kWarps rows). One warp per row.
template <typename T>
__global__ void state_rows(const AttentionBackwardRelevancy problem, RowState* states) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (index >= problem.batch * problem.targets * problem.heads * problem.queries) return;
  const int64_t i = index % problem.queries, h = index / problem.queries % problem.heads,
                n = index / problem.queries / problem.heads % problem.targets,
                b = index / problem.queries / problem.heads / problem.targets;
  const T* output = static_cast<const T*>(problem.output) + b * problem.output_stride[0] +
                    h * problem.output_stride[1] + i * problem.output_stride[2];
  const T* gradient = static_cast<const T*>(problem.grad_output) + b * problem.grad_stride[0] +
                      n * problem.grad_stride[1] + h * problem.grad_stride[2] + i * problem.grad_stride[3];
  float sum = 0.0f;
  for (int64_t c = lane(); c < problem.width; c += 32) sum = fmaf(to_float(output[c]), to_float(gradient[c]), sum);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane() == 0) {
    states[index] = {problem.logsumexp[(b * problem.heads + h) * problem.queries + i] * -kLog2E,
                     sum,
                     problem.row[(b * problem.targets + n) * problem.queries + i],
                     larger(problem.key_start[b * problem.queries + i], 0),
                     smaller(problem.key_end[b * problem.queries + i], static_cast<int>(problem.keys)),
                     {}};
  }
}

// Queries, gradients and states of every head of a group, of every listed tile, kSize rows at a time.
template <typename T, int kSize>
struct RowPairs {
  Rows<T> query, gradient;  // of the first head
  int64_t query_stride, gradient_stride;
  const RowState* states;
  int heads;
  const int* list;
  int listed, part = 0;

  __device__ bool next(Pair<T>& pair) {
    constexpr int kParts = kTileRows / kSize;
    if (heads == 0) return false;
    // The second half of the last tile may lie past the last row.
    const int first = smaller(list[part / kParts] / 2 * kTileRows + part % kParts * kSize, query.count);
    pair = {moved(query, first), moved(gradient, first), states + first};
    if (++part == listed * kParts) {
      part = 0;
      --heads;
      query.data += query_stride;
      gradient.data += gradient_stride;
      states += query.count;
    }
    return true;
  }
};

// Grid: (blocks of keys · chunks of the width, Hkv, B·N). partial: (B, Hkv, N, Sk); every entry is written.
template <typename Tiles>
__global__ void __launch_bounds__(kThreads, 2)
    backward_keys(const AttentionBackwardRelevancy problem, const BackwardPlan plan, const TileRange* ranges,
                  const RowState* states, float* partial) {
  using T = typename Tiles::Element;
  constexpr int kLeft = Tiles::kThreadLeft, kRight = Tiles::kThreadRight;
  // Compiled for every architecture, launched only where there are tensor cores.
  if constexpr (Tiles::kTensorCores && !ptx::kTensorCores) return;

  const int64_t targets = problem.targets, b = blockIdx.z / targets, n = blockIdx.z % targets, key_head = blockIdx.y;
  const int group = static_cast<int>(problem.heads / problem.key_heads);
  const int rows = static_cast<int>(problem.queries);
  const int chunks = Tiles::chunks(plan.shape.width);
  const int chunk = static_cast<int>(blockIdx.x) % chunks;
  const int first_key = static_cast<int>(blockIdx.x) / chunks * Tiles::kLeft;
  const int last_key = smaller(first_key + Tiles::kLeft, static_cast<int>(problem.keys));
  const int64_t first_head = key_head * group;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  int* const list = reinterpret_cast<int*>(shared_memory + Tiles::kSharedBytes);
  const float scale = problem.scale * kLog2E;

  Tiles tiles(shared_memory,
              rows_from<T>(problem.key, b * problem.key_stride[0] + key_head * problem.key_stride[1],
                           problem.key_stride[2], first_key, problem.keys),
              rows_from<T>(problem.value, b * problem.value_stride[0] + key_head * problem.value_stride[1],
                           problem.value_stride[2], first_key, problem.keys),
              plan.shape, chunk);
  float sum[kLeft] = {};

  for (int begin = 0; begin < plan.tiles; begin += kMaxListed) {
    // Every thread knows how long the list before this one was.
    __syncthreads();
    const int listed = list_tiles(ranges + b * plan.tiles, begin, 1, smaller(begin + kMaxListed, plan.tiles), first_key,
                                  last_key, list + 1, list);
    if (listed == 0) continue;
    RowPairs<T, Tiles::kRight> source{
        rows_from<T>(problem.query, b * problem.query_stride[0] + first_head * problem.query_stride[1],
                     problem.query_stride[2], 0, rows),
        rows_from<T>(problem.grad_output,
                     b * problem.grad_stride[0] + n * problem.grad_stride[1] + first_head * problem.grad_stride[2],
                     problem.grad_stride[3], 0, rows),
        problem.query_stride[1],
        problem.grad_stride[2],
        states + (blockIdx.z * problem.heads + first_head) * rows,
        group,
        list + 1,
        listed};
    tiles.start(source);

    for (int t = 0; t < group * listed; ++t) {
      const bool all = list[1 + t % listed] % 2 != 0;  // every head has the same tiles
      for (int part = 0; part < kTileRows; part += Tiles::kRight) {
        tiles.step(source, [&](float (&score)[kLeft][kRight], float (&gradient)[kLeft][kRight], const RowState* own) {
#pragma unroll
          for (int q = 0; q < kRight; ++q) {
            const RowState& state = own[Tiles::right(q)];
#pragma unroll
            for (int a = 0; a < kLeft; ++a) {
              const int j = first_key + Tiles::left(a);
              const float probability = ptx::exp2(fmaf(score[a][q], scale, state.shift));
              const bool seen = all || (state.start <= j && j < state.end);
              const float added = fmaf(state.weight, ptx::rectified(probability * gradient[a][q]), sum[a]);
              sum[a] = seen && state.weight != 0.0f ? added : sum[a];
              gradient[a][q] = seen ? probability * (gradient[a][q] - state.delta) : 0.0f;
              score[a][q] = seen ? probability : 0.0f;
            }
          }
        });
      }
    }
  }

  const int64_t head = (static_cast<int64_t>(blockIdx.z) * problem.key_heads + key_head) * problem.keys + first_key;
  tiles.template store<0>(static_cast<T*>(problem.grad_key) + head * problem.width, last_key - first_key,
                          problem.scale);
  tiles.template store<1>(static_cast<T*>(problem.grad_value) + head * problem.width, last_key - first_key, 1.0f);

  float* const own = partial + ((b * problem.key_heads + key_head) * targets + n) * problem.keys;
#pragma unroll
  for (int a = 0; a < kLeft; ++a) {
    for (int step = 1; step < Tiles::kLanesPerLeft; step *= 2) sum[a] += __shfl_xor_sync(~0u, sum[a], step);
    const int j = first_key + Tiles::left(a);
    // Every chunk of the width has the same sums.
    if (chunk == 0 && Tiles::first_of_left() && j < last_key) own[j] = sum[a];
  }
}

// Keys and values, kSize rows at a time.
template <typename T, int kSize>
struct KeyPairs {
  Rows<T> key, value;
  int first, last;

  __device__ bool next(Pair<T>& pair) {
    if (first >= last) return false;
    pair = {moved(key, first), moved(value, first), nullptr};
    first += kSize;
    return true;
  }
};

// Grid: (blocks of rows · chunks of the width, H, B·N).
template <typename Tiles>
__global__ void __launch_bounds__(kThreads, 2)
    backward_rows(const AttentionBackwardRelevancy problem, const BackwardPlan plan, const TileRange* ranges,
                  const RowState* states) {
  using T = typename Tiles::Element;
  constexpr int kLeft = Tiles::kThreadLeft, kRight = Tiles::kThreadRight;
  if constexpr (Tiles::kTensorCores && !ptx::kTensorCores) return;

  const int64_t b = blockIdx.z / problem.targets, n = blockIdx.z % problem.targets, h = blockIdx.y;
  const int64_t key_head = h / (problem.heads / problem.key_heads);
  const int rows = static_cast<int>(problem.queries), keys = static_cast<int>(problem.keys);
  const int chunks = Tiles::chunks(plan.shape.width);
  // The last rows come first: below a causal mask they see most.
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int first_row = block / chunks * Tiles::kLeft;
  const int64_t head = (static_cast<int64_t>(blockIdx.z) * problem.heads + h) * rows;

  const TileRange range = join_tiles(ranges + b * plan.tiles, first_row / kTileRows,
                                     smaller((first_row + Tiles::kLeft) / kTileRows, plan.tiles), keys);
  const int first_key = range.first / Tiles::kRight * Tiles::kRight;

  float shift[kLeft], delta[kLeft];
  int start[kLeft], end[kLeft];
#pragma unroll
  for (int a = 0; a < kLeft; ++a) {
    const int i = first_row + Tiles::left(a);
    const RowState state = i < rows ? states[head + i] : RowState{};
    shift[a] = state.shift, delta[a] = state.delta, start[a] = state.start, end[a] = state.end;
  }

  extern __shared__ __align__(16) unsigned char shared_memory[];
  const float scale = problem.scale * kLog2E;
  Tiles tiles(shared_memory,
              rows_from<T>(problem.query, b * problem.query_stride[0] + h * problem.query_stride[1],
                           problem.query_stride[2], first_row, rows),
              rows_from<T>(problem.grad_output,
                           b * problem.grad_stride[0] + n * problem.grad_stride[1] + h * problem.grad_stride[2],
                           problem.grad_stride[3], first_row, rows),
              plan.shape, block % chunks);
  KeyPairs<T, Tiles::kRight> source{
      rows_from<T>(problem.key, b * problem.key_stride[0] + key_head * problem.key_stride[1], problem.key_stride[2], 0,
                   keys),
      rows_from<T>(problem.value, b * problem.value_stride[0] + key_head * problem.value_stride[1],
                   problem.value_stride[2], 0, keys),
      first_key, range.last};
  tiles.start(source);

  for (int key = first_key; key < range.last; key += Tiles::kRight) {
    const bool all = range.common_first <= key && range.common_last >= key + Tiles::kRight;
    tiles.step(source, [&](float (&score)[kLeft][kRight], float (&gradient)[kLeft][kRight], const RowState*) {
#pragma unroll
      for (int q = 0; q < kRight; ++q) {
        const int j = key + Tiles::right(q);
#pragma unroll
        for (int a = 0; a < kLeft; ++a) {
          const float probability = ptx::exp2(fmaf(score[a][q], scale, shift[a]));
          const float product = probability * (gradient[a][q] - delta[a]);
          gradient[a][q] = all || (start[a] <= j && j < end[a]) ? product : 0.0f;
        }
      }
    });
  }
  tiles.template store<0>(static_cast<T*>(problem.grad_query) + (head + first_row) * problem.width, rows - first_row,
                          problem.scale);
}

inline BackwardPlan make_plan(const AttentionBackwardRelevancy& problem) {
  BackwardPlan plan;
  plan.tiles = static_cast<int>(blocks(problem.queries, kTileRows));
  plan.shape = row_shape(problem);
  return plan;
}

inline int64_t tile_range_count(const AttentionBackwardRelevancy& problem, const BackwardPlan& plan) {
  return problem.batch * plan.tiles;
}
inline int64_t state_count(const AttentionBackwardRelevancy& problem) {
  return problem.batch * problem.targets * problem.heads * problem.queries;
}
inline int64_t partial_count(const AttentionBackwardRelevancy& problem) {
  return problem.batch * problem.key_heads * problem.targets * problem.keys;
}

// Of one block of backward_keys: the tiles, the list of tiles and its length. backward_rows has no list.
template <typename Tiles>
int backward_keys_bytes(int64_t tiles) {
  return Tiles::kSharedBytes + static_cast<int>((1 + (tiles < kMaxListed ? tiles : kMaxListed)) * sizeof(int));
}

// KeyTiles: with two sums, for backward_keys; RowTiles: with one, for backward_rows.
template <typename KeyTiles, typename RowTiles, typename Launch>
void launch_backward(const AttentionBackwardRelevancy& problem, const BackwardPlan& plan, const TileRange* ranges,
                     RowState* states, float* partial, const Launch& launch) {
  const auto z = static_cast<unsigned>(problem.batch * problem.targets);
  if (problem.queries > 0) {
    launch(state_rows<typename KeyTiles::Element>,
           dim3(static_cast<unsigned>(blocks(state_count(problem), kWarps)), 1, 1), 0, problem, states);
  }
  if (problem.keys > 0) {
    const int64_t x = blocks(problem.keys, KeyTiles::kLeft) * KeyTiles::chunks(plan.shape.width);
    launch(backward_keys<KeyTiles>, dim3(static_cast<unsigned>(x), static_cast<unsigned>(problem.key_heads), z),
           backward_keys_bytes<KeyTiles>(plan.tiles), problem, plan, ranges, states, partial);
  }
  if (problem.queries > 0) {
    const int64_t x = blocks(problem.queries, RowTiles::kLeft) * RowTiles::chunks(plan.shape.width);
    launch(backward_rows<RowTiles>, dim3(static_cast<unsigned>(x), static_cast<unsigned>(problem.heads), z),
           RowTiles::kSharedBytes, problem, plan, ranges, states);
  }
}

template <typename T, typename Launch>
void launch_backward_16_bit(const AttentionBackwardRelevancy& problem, const BackwardPlan& plan, bool tensor_cores,
                            const TileRange* ranges, RowState* states, float* partial, const Launch& launch) {
  if (!tensor_cores || problem.width > 256) {
    launch_backward<FmaPairs<T, 2>, FmaPairs<T, 1>>(problem, plan, ranges, states, partial, launch);
  } else if (problem.width <= 64) {
    launch_backward<TensorCorePairs<T, 64, 2>, TensorCorePairs<T, 64, 1>>(problem, plan, ranges, states, partial,
                                                                          launch);
  } else if (problem.width <= 96) {
    launch_backward<TensorCorePairs<T, 96, 2>, TensorCorePairs<T, 96, 1>>(problem, plan, ranges, states, partial,
                                                                          launch);
  } else if (problem.width <= 128) {
    launch_backward<TensorCorePairs<T, 128, 2>, TensorCorePairs<T, 128, 1>>(problem, plan, ranges, states, partial,
                                                                            launch);
  } else {
    launch_backward<TensorCorePairs<T, 256, 2>, TensorCorePairs<T, 256, 1>>(problem, plan, ranges, states, partial,
                                                                            launch);
  }
}

// Calls launch(kernel, grid, bytes of shared memory, arguments…) for each of the five kernels that has anything to do.
template <typename Launch>
void launch_kernels(const AttentionBackwardRelevancy& problem, const BackwardPlan& plan, const Device& device,
                    TileRange* ranges, RowState* states, float* partial, const Launch& launch) {
  const auto batch = static_cast<unsigned>(problem.batch);
  if (plan.tiles > 0) {
    launch(outline_tiles, dim3(static_cast<unsigned>(blocks(plan.tiles, kWarps)), batch, 1), 0, problem.key_start,
           problem.key_end, static_cast<const float*>(nullptr), problem.targets, problem.queries, problem.keys,
           plan.tiles, ranges);
  }
  switch (problem.element) {
    case Element::kFloat32:
      launch_backward<FmaPairs<float, 2>, FmaPairs<float, 1>>(problem, plan, ranges, states, partial, launch);
      break;
    case Element::kBFloat16:
      launch_backward_16_bit<BFloat16>(problem, plan, device.tensor_cores, ranges, states, partial, launch);
      break;
    case Element::kFloat16:
      launch_backward_16_bit<Float16>(problem, plan, device.tensor_cores, ranges, states, partial, launch);
      break;
  }
  const int64_t columns = problem.targets * problem.keys;
  if (columns > 0) {
    launch(average_heads, dim3(static_cast<unsigned>(blocks(columns, kThreads)), batch, 1), 0, partial, problem.product,
           problem.key_heads, columns, problem.heads);
  }
}

}  // namespace fastxai::cuda
