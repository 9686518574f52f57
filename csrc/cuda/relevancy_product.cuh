// Device code of relevancy_product, and how it is launched. Beyond the CUDA language it uses only what ptx.cuh names,
// so that a test can compile it for the host.
//
// Three kernels, and nothing between them but the stream's order:
//   outline_tiles              what every tile of query rows sees, so that tiles that add nothing are passed over
//   relevancy_product_columns  one block per (keys, head, share of the rows, sample): weighted column sums
//   average_heads              adds the blocks' sums up, always in the same order: the same bits every time
// Asked for atomics, average_heads comes first and clears the result, to which the blocks then add in any order.
#pragma once

#include <cstdint>

#include "../common/relevancy_product.h"
#include "shared_kernels.cuh"

namespace fastxai::cuda {

// How a problem is cut up.
struct Plan {
  int tiles;   // of kTileRows query rows, per sample
  int splits;  // blocks that share the tiles of one head
  bool atomics;
  RowShape shape;
};

// The tiles of rows in the order in which they are multiplied: of every listed tile the queries, then each gradient.
template <typename T>
struct RowSource {
  const T *query, *grad_output;  // of one sample and head; of the first target
  int64_t query_stride, grad_stride, target_stride;
  int queries, gradients;
  const int* list;
  int listed, tile = 0, step = 0;

  __device__ bool next(Rows<T>& rows) {
    if (tile == listed) return false;
    const int first = list[tile] / 2 * kTileRows;
    if (step == 0) {
      rows = {query + first * query_stride, query_stride, queries - first};
    } else {
      rows = {grad_output + (step - 1) * target_stride + first * grad_stride, grad_stride, queries - first};
    }
    if (++step > gradients) {
      step = 0;
      ++tile;
    }
    return true;
  }
};

// What one thread adds up for its keys.
template <int kCount>
struct alignas(kCount % 4 == 0 ? 16 : 8) Sums {
  float key[kCount];
};

// Bit q + i·kThreadQueries: the thread's query q sees its key i.
template <typename Tiles>
__device__ inline uint32_t visible_entries(const int32_t* key_start, const int32_t* key_end, int first_row, int rows,
                                           int first_key) {
  static_assert(Tiles::kThreadKeys * Tiles::kThreadQueries <= 32);
  uint32_t visible = 0;
#pragma unroll
  for (int q = 0; q < Tiles::kThreadQueries; ++q) {
    const int i = first_row + Tiles::query(q);
    const int start = i < rows ? key_start[i] : 0, end = i < rows ? key_end[i] : 0;
#pragma unroll
    for (int a = 0; a < Tiles::kThreadKeys; ++a) {
      const int j = first_key + Tiles::key(a);
      visible |= static_cast<uint32_t>(start <= j && j < end) << (q + a * Tiles::kThreadQueries);
    }
  }
  return visible;
}

// Adds weighted products of the queries from `first` on. A hidden key gets nothing, not even from a weight that is not
// finite; nor does any key from a weight of zero. all: every key is seen, and no weight is zero.
template <typename Tiles, int kCount>
__device__ inline void add_columns(const float (&product)[Tiles::kThreadKeys][kCount], int first, const float* row,
                                   int first_row, int rows, bool all, uint32_t visible, Sums<Tiles::kThreadKeys>& sum) {
  float weight[kCount];
#pragma unroll
  for (int q = 0; q < kCount; ++q) {
    const int i = first_row + Tiles::query(first + q);
    weight[q] = i < rows ? row[i] : 0.0f;
  }
  const auto add = [&](const auto& counts) {
#pragma unroll
    for (int a = 0; a < Tiles::kThreadKeys; ++a) {
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        const float added = fmaf(weight[q], product[a][q], sum.key[a]);
        sum.key[a] = counts(a, q) ? added : sum.key[a];
      }
    }
  };
  if (all) {
    add([](int, int) { return true; });
  } else {
    add([&](int a, int q) {
      return (visible >> (first + q + a * Tiles::kThreadQueries) & 1) != 0 && weight[q] != 0.0f;
    });
  }
}

// Grid: (blocks of keys, H·splits, B·chunks of targets). partial: (B, H·splits, N, Sk); every entry is written, unless
// with atomics, when there is none.
template <typename Tiles>
__global__ void __launch_bounds__(kThreads, 2)
    relevancy_product_columns(const RelevancyProduct problem, const Plan plan, const TileRange* ranges,
                              float* partial) {
  using T = typename Tiles::Element;
  constexpr int kKeys = Tiles::kThreadKeys, kQueries = Tiles::kThreadQueries, kPart = Tiles::kPart;
  // Compiled for every architecture, launched only where there are tensor cores.
  if constexpr (Tiles::kTensorCores && !ptx::kTensorCores) return;

  const int chunks = static_cast<int>((problem.targets + Tiles::kMaxTargets - 1) / Tiles::kMaxTargets);
  const int b = static_cast<int>(blockIdx.z) / chunks,
            first_target = static_cast<int>(blockIdx.z) % chunks * Tiles::kMaxTargets;
  const int h = static_cast<int>(blockIdx.y) / plan.splits;
  const int key_head = h / static_cast<int>(problem.heads / problem.key_heads);
  const int targets = smaller(Tiles::kMaxTargets, static_cast<int>(problem.targets - first_target));
  const bool own_gradients = problem.grad_targets > 1;
  const int rows = static_cast<int>(problem.queries);
  const int first_key = static_cast<int>(blockIdx.x) * Tiles::kKeys;
  const int last_key = smaller(first_key + Tiles::kKeys, static_cast<int>(problem.keys));

  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto* const sums = reinterpret_cast<Sums<kKeys>*>(shared_memory + Tiles::kSharedBytes) + threadIdx.x;
  int* const list = reinterpret_cast<int*>(shared_memory + Tiles::kSharedBytes + targets * kThreads * sizeof(*sums));
  for (int n = 0; n < targets; ++n) sums[n * kThreads] = {};
  const int listed =
      list_tiles(ranges + static_cast<int64_t>(b) * plan.tiles, static_cast<int>(blockIdx.y) % plan.splits, plan.splits,
                 plan.tiles, first_key, last_key, list + 1, list);

  if (listed > 0) {
    const auto keys_of = [&](const void* tensor, const int64_t (&stride)[3]) {
      return Rows<T>{static_cast<const T*>(tensor) + b * stride[0] + key_head * stride[1] + first_key * stride[2],
                     stride[2], static_cast<int>(problem.keys) - first_key};
    };
    RowSource<T> source{
        static_cast<const T*>(problem.query) + b * problem.query_stride[0] + h * problem.query_stride[1],
        static_cast<const T*>(problem.grad_output) + b * problem.grad_stride[0] + h * problem.grad_stride[2] +
            (own_gradients ? first_target * problem.grad_stride[1] : 0),
        problem.query_stride[2],
        problem.grad_stride[3],
        problem.grad_stride[1],
        rows,
        own_gradients ? targets : 1,
        list + 1,
        listed};
    Tiles tiles(shared_memory, keys_of(problem.key, problem.key_stride), keys_of(problem.value, problem.value_stride),
                plan.shape, source);
    const float* logsumexp = problem.logsumexp + (b * problem.heads + h) * problem.queries;
    const float* row = problem.row + (b * problem.targets + first_target) * problem.queries;
    const float scale = problem.scale * kLog2E;

    for (int t = 0; t < listed; ++t) {
      const int first_row = list[1 + t] / 2 * kTileRows;
      const bool all = list[1 + t] % 2 != 0;
      float probability[kKeys][kQueries];
      tiles.template multiply<false>(source, [&](int first, const float (&score)[kKeys][kPart]) {
#pragma unroll
        for (int q = 0; q < kPart; ++q) {
          const int i = first_row + Tiles::query(first + q);
          const float shift = i < rows ? logsumexp[i] * -kLog2E : 0.0f;
#pragma unroll
          for (int a = 0; a < kKeys; ++a) probability[a][first + q] = ptx::exp2(fmaf(score[a][q], scale, shift));
        }
      });
      const uint32_t visible =
          all ? ~0u
              : visible_entries<Tiles>(problem.key_start + b * problem.queries, problem.key_end + b * problem.queries,
                                       first_row, rows, first_key);

      for (int n = 0; n < targets; ++n) {
        const float* weight = row + n * problem.queries;
        Sums<kKeys> sum = sums[n * kThreads];
        if (own_gradients || n == 0) {
          tiles.template multiply<true>(source, [&](int first, float (&product)[kKeys][kPart]) {
#pragma unroll
            for (int a = 0; a < kKeys; ++a) {
#pragma unroll
              for (int q = 0; q < kPart; ++q) {
                product[a][q] = ptx::rectified(probability[a][first + q] * product[a][q]);
                // One gradient for all targets: its product replaces the probability, to be weighted once per target.
                if (!own_gradients) probability[a][first + q] = product[a][q];
              }
            }
            if (own_gradients) add_columns<Tiles>(product, first, weight, first_row, rows, all, visible, sum);
          });
        }
        if (!own_gradients) add_columns<Tiles>(probability, 0, weight, first_row, rows, all, visible, sum);
        sums[n * kThreads] = sum;
      }
    }
  }

  const int64_t part = plan.atomics ? b : static_cast<int64_t>(b) * gridDim.y + blockIdx.y;
  float* own = (plan.atomics ? problem.result : partial) + (part * problem.targets + first_target) * problem.keys;
  for (int n = 0; n < targets; ++n) {
    Sums<kKeys> sum = sums[n * kThreads];
#pragma unroll
    for (int a = 0; a < kKeys; ++a) {
      for (int step = 1; step < Tiles::kLanesPerKey; step *= 2) {
        sum.key[a] += __shfl_xor_sync(~0u, sum.key[a], step);
      }
      const int j = first_key + Tiles::key(a);
      if (lane() % Tiles::kLanesPerKey != 0 || j >= last_key) continue;
      if (plan.atomics) {
        atomicAdd(own + n * problem.keys + j, sum.key[a] / static_cast<float>(problem.heads));
      } else {
        own[n * problem.keys + j] = sum.key[a];
      }
    }
  }
}

inline Plan make_plan(const RelevancyProduct& problem, const Device& device, bool atomics) {
  Plan plan;
  plan.atomics = atomics;
  plan.tiles = static_cast<int>(blocks(problem.queries, kTileRows));
  // Small problems share a head's rows among blocks until every multiprocessor has about four, but no block has less
  // than four tiles. The number of targets has no say, so that it changes no bit of the result.
  const int64_t unsplit = blocks(problem.keys, 128) * problem.heads * problem.batch;
  const int64_t wanted = blocks(4 * device.multiprocessors, unsplit), most = plan.tiles / 4;
  const int64_t splits = wanted < most ? wanted : most, least = blocks(plan.tiles, kMaxListed);
  plan.splits = static_cast<int>(splits > least ? splits : least);
  if (plan.splits < 1) plan.splits = 1;

  plan.shape = row_shape(problem);
  return plan;
}

inline int64_t tile_range_count(const RelevancyProduct& problem, const Plan& plan) {
  return problem.batch * plan.tiles;
}
inline int64_t partial_count(const RelevancyProduct& problem, const Plan& plan) {
  return plan.atomics ? 0 : problem.batch * problem.heads * plan.splits * problem.targets * problem.keys;
}

// Of one block: the tiles, a sum per thread and target, the list of tiles and its length.
template <typename Tiles>
int shared_bytes(int64_t targets, int64_t listed) {
  const int64_t sums = targets * kThreads * static_cast<int64_t>(sizeof(Sums<Tiles::kThreadKeys>));
  return static_cast<int>(Tiles::kSharedBytes + sums + (1 + listed) * static_cast<int64_t>(sizeof(int)));
}

template <typename Tiles, typename Launch>
void launch_columns(const RelevancyProduct& problem, const Plan& plan, const TileRange* ranges, float* partial,
                    const Launch& launch) {
  const int64_t chunks = blocks(problem.targets, Tiles::kMaxTargets);
  const int64_t targets = chunks > 1 ? Tiles::kMaxTargets : problem.targets;
  const dim3 grid(static_cast<unsigned>(blocks(problem.keys, Tiles::kKeys)),
                  static_cast<unsigned>(problem.heads * plan.splits), static_cast<unsigned>(problem.batch * chunks));
  launch(relevancy_product_columns<Tiles>, grid, shared_bytes<Tiles>(targets, blocks(plan.tiles, plan.splits)), problem,
         plan, ranges, partial);
}

template <typename T, typename Launch>
void launch_columns_16_bit(const RelevancyProduct& problem, const Plan& plan, bool tensor_cores,
                           const TileRange* ranges, float* partial, const Launch& launch) {
  if (!tensor_cores || problem.width > 256) {
    launch_columns<FmaTiles<T>>(problem, plan, ranges, partial, launch);
  } else if (problem.width <= 64) {
    launch_columns<TensorCoreTiles<T, 64>>(problem, plan, ranges, partial, launch);
  } else if (problem.width <= 96) {
    launch_columns<TensorCoreTiles<T, 96>>(problem, plan, ranges, partial, launch);
  } else if (problem.width <= 128) {
    launch_columns<TensorCoreTiles<T, 128>>(problem, plan, ranges, partial, launch);
  } else {
    launch_columns<TensorCoreTiles<T, 256>>(problem, plan, ranges, partial, launch);
  }
}

// Calls launch(kernel, grid, bytes of shared memory, arguments…) for each of the three kernels.
template <typename Launch>
void launch_kernels(const RelevancyProduct& problem, const Plan& plan, const Device& device, TileRange* ranges,
                    float* partial, const Launch& launch) {
  const auto batch = static_cast<unsigned>(problem.batch);
  if (plan.tiles > 0) {
    launch(outline_tiles, dim3(static_cast<unsigned>(blocks(plan.tiles, kWarps)), batch, 1), 0, problem.key_start,
           problem.key_end, problem.row, problem.targets, problem.queries, problem.keys, plan.tiles, ranges);
  }
  const auto add_up = [&](int64_t parts) {
    const int64_t columns = problem.targets * problem.keys;
    launch(average_heads, dim3(static_cast<unsigned>(blocks(columns, kThreads)), batch, 1), 0, partial, problem.result,
           parts, columns, problem.heads);
  };
  if (plan.atomics) add_up(0);
  switch (problem.element) {
    case Element::kFloat32:
      launch_columns<FmaTiles<float>>(problem, plan, ranges, partial, launch);
      break;
    case Element::kBFloat16:
      launch_columns_16_bit<BFloat16>(problem, plan, device.tensor_cores, ranges, partial, launch);
      break;
    case Element::kFloat16:
      launch_columns_16_bit<Float16>(problem, plan, device.tensor_cores, ranges, partial, launch);
      break;
  }
  if (!plan.atomics) add_up(problem.heads * plan.splits);
}

}  // namespace fastxai::cuda
