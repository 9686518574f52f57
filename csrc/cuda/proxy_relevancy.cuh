// Device code of proxy_relevancy, and how it is launched. Beyond the CUDA language it uses only what ptx.cuh names, so
// that a test can compile it for the host.
//
// Two kernels:
//   proxy_relevancy_scores  one block per (columns, query rows, sample): reads a state once, leaves scores in the map
//   proxy_relevancy_maps    one block per query row: makes the scores a map, and sums its entropies up
// The second begins while the first still runs, on devices that can do this, and waits for its scores.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/proxy_relevancy.h"
#include "shared_kernels.cuh"

namespace fastxai::cuda {

// Columns of a block. They share what it reads of the query, which is twice as wide as a 16-bit state.
constexpr int kProxyColumns = 4;
// Query rows for which a block reads its columns. The blocks of further rows find them in L2, and 64 rows of one sample
// of 576 columns are 288 blocks, two for each multiprocessor of an H100, where 144 would leave it waiting for the
// query.
constexpr int kProxyRows = 32;

// 16 bytes as they are in memory.
struct alignas(16) Words {
  uint32_t word[4];
};

template <typename T>
__device__ inline float element_of(const Words& words, int e) {
  T element;
  if constexpr (sizeof(T) == 4) {
    memcpy(&element, &words.word[e], 4);
  } else {
    element.bits = static_cast<uint16_t>(words.word[e / 2] >> (e % 2 * 16));
  }
  return to_float(element);
}

// States that start at a multiple of 16 bytes, like their query rows, and whose width is one; kRows: of the query, that
// a block takes on at a time.
template <typename T, int kRows_>
struct WideStates {
  using Element = T;
  static constexpr int kRows = kRows_;
  static constexpr bool kWide = true;
  // Loads of each column that a thread has under way: of one row's 128 threads 32 KB, twice what a multiprocessor of an
  // H100 needs in flight for its share of 3 TB/s at 0.7 µs. Several rows' sums take the registers of two.
  static constexpr int kVectors = kRows == 1 ? 4 : 2;

  // The first of `present` elements is at `from`; those past them are zero.
  template <typename Number>
  __device__ static Words load(const Number* from, int present) {
    return present > 0 ? *reinterpret_cast<const Words*>(from) : Words{};
  }
};

// Any others.
template <typename T, int kRows_>
struct NarrowStates {
  using Element = T;
  static constexpr int kRows = kRows_;
  static constexpr bool kWide = false;
  static constexpr int kVectors = 2;  // of single loads

  template <typename Number>
  __device__ static Words load(const Number* from, int present) {
    constexpr int kElements = 16 / sizeof(Number);
    Number elements[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) elements[e] = e < present ? from[e] : Number{};
    Words words;
    memcpy(&words, elements, sizeof(words));
    return words;
  }
};

// Sums kCount values over the lanes of a warp, with fewer exchanges than one value after the other: a lane gives away
// one half of its values and keeps the other. Lane l gets the sum of value l / (32 / kCount), whose bits do not depend
// on kCount.
template <int kCount>
__device__ inline float sum_over_lanes(float (&values)[kCount]) {
  static_assert(kCount <= 32 && (kCount & (kCount - 1)) == 0);
  int step = 16;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = (lane() & step) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(~0u, given, step);
    }
    step /= 2;
  }
#pragma unroll
  for (int left = 32 / kCount / 2; left > 0; left /= 2) values[0] += __shfl_xor_sync(~0u, values[0], left);
  return values[0];
}

// The same, into the slots of the values.
template <int kCount>
__device__ inline void sum_into(float* slots, bool first, float (&values)[kCount]) {
  const float sum = sum_over_lanes(values);
  constexpr int kLanes = 32 / kCount;
  if (lane() % kLanes == 0) slots[lane() / kLanes] = first ? sum : slots[lane() / kLanes] + sum;
}

// In shared memory, what each warp has summed over its part of the columns' width.
struct ProxySums {
  float chunk[kWarps][kProxyColumns];                 // of the states that a block reads first
  float moments[kWarps][2][kProxyColumns];            // Σd² and Σd of d = x − pivot
  float products[kWarps][kProxyRows][kProxyColumns];  // Σ d·query
  float query[kWarps][kProxyRows];                    // Σ query
};

template <typename Number>
__device__ inline float over_warps(const Number& of_warp) {
  float sum = of_warp(0);
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += of_warp(w);
  return sum;
}

__device__ inline int columns_of(const ProxyRelevancy& problem, int64_t b) {
  return smaller(larger(problem.lengths[b], 0), static_cast<int>(problem.columns));
}

// Grid: (blocks of kProxyColumns columns, blocks of kProxyRows query rows, B). Writes scores without their offset
// into the map, and nothing past the columns of the sample.
//
// A centred row's sums are taken of d = x − pivot. The pivot is the mean of the states that the block reads first:
// with a share f of the width, (μ − pivot)² ≤ σ²·(1 − f)/f, so that Σd²/D − (μ − pivot)² loses
// nothing.
template <typename States>
__global__ void __launch_bounds__(kThreads, States::kRows == 1 ? 4 : 3)
    proxy_relevancy_scores(const ProxyRelevancy problem) {
  using T = typename States::Element;
  constexpr int kRows = States::kRows, kVectors = States::kVectors, kElements = 16 / sizeof(T);
  constexpr int kQueryWords = kElements / 4;
  constexpr int kChunk = kThreads * kElements * kVectors;
  ptx::let_next_kernel_begin();

  const int64_t b = blockIdx.z;
  const int width = static_cast<int>(problem.width), columns = columns_of(problem, b);
  const int first_column = static_cast<int>(blockIdx.x) * kProxyColumns;
  if (first_column >= columns) return;
  const int first_row = static_cast<int>(blockIdx.y) * kProxyRows;
  const int rows = smaller(static_cast<int>(problem.targets) - first_row, kProxyRows);
  const T* const hidden = static_cast<const T*>(problem.hidden) + b * problem.hidden_stride[0];
  const float* const query = problem.query + (b * problem.targets + first_row) * width;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  ProxySums& sums = *reinterpret_cast<ProxySums*>(shared_memory);
  float pivot[kProxyColumns] = {}, square[kProxyColumns] = {}, deviation[kProxyColumns] = {};

#pragma unroll 1
  for (int chunk = 0; chunk < width; chunk += kChunk) {
    const auto at = [&](int v) { return chunk + (v * kThreads + static_cast<int>(threadIdx.x)) * kElements; };
    const auto query_words = [&](int row, int v, int i) {
      const int k = at(v) + i * 4;
      return States::load(query + static_cast<int64_t>(row) * width + k, width - k);
    };
    Words states[kProxyColumns][kVectors];
    Words held[kVectors][kQueryWords];
    // All of them are under way before the first is used.
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int c = 0; c < kProxyColumns; ++c) {
        // Past the last column it is read again, and dropped.
        const T* const state = hidden + smaller(first_column + c, columns - 1) * problem.hidden_stride[1];
        states[c][v] = States::load(state + at(v), width - at(v));
      }
      // One row has room in registers beside the states, so that it is under way with them.
      if constexpr (kRows == 1) {
#pragma unroll
        for (int i = 0; i < kQueryWords; ++i) held[v][i] = query_words(0, v, i);
      }
    }

    if (chunk == 0 && problem.centered) {
      float sum[kProxyColumns] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
#pragma unroll
          for (int c = 0; c < kProxyColumns; ++c) sum[c] += element_of<T>(states[c][v], e);
        }
      }
      sum_into(sums.chunk[warp()], true, sum);
      __syncthreads();
      const float share = 1.0f / static_cast<float>(smaller(width, kChunk));
#pragma unroll
      for (int c = 0; c < kProxyColumns; ++c) {
        pivot[c] = over_warps([&](int w) { return sums.chunk[w][c]; }) * share;
      }
    }

#pragma unroll 1
    for (int row = 0; row < rows; row += kRows) {
      const bool measures = kRows == 1 || row == 0;
      // Converted anew: kept from the pivot, or from one row to the next, the states take twice the registers there
      // are.
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int c = 0; c < kProxyColumns; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ptx::forget(states[c][v].word[i]);
        }
      }
      float product[kRows * kProxyColumns] = {}, weight[kRows] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (at(v) >= width) continue;
#pragma unroll
        for (int i = 0; i < kQueryWords; ++i) {
          Words part[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            // Past the last row it is read again, and dropped.
            part[r] = kRows == 1 ? held[v][i] : query_words(smaller(row + r, rows - 1), v, i);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const bool present = States::kWide || at(v) + i * 4 + e < width;
            float shifted[kProxyColumns];
#pragma unroll
            for (int c = 0; c < kProxyColumns; ++c) {
              shifted[c] = present ? element_of<T>(states[c][v], i * 4 + e) - pivot[c] : 0.0f;
              if (measures) {
                square[c] = fmaf(shifted[c], shifted[c], square[c]);
                deviation[c] += shifted[c];
              }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const float factor = element_of<float>(part[r], e);
              weight[r] += factor;
#pragma unroll
              for (int c = 0; c < kProxyColumns; ++c) {
                product[r * kProxyColumns + c] = fmaf(shifted[c], factor, product[r * kProxyColumns + c]);
              }
            }
          }
        }
      }
      sum_into(sums.products[warp()][row], chunk == 0, product);
      if (problem.centered) sum_into(sums.query[warp()] + row, chunk == 0, weight);
    }
  }

  float moments[2 * kProxyColumns];
#pragma unroll
  for (int c = 0; c < kProxyColumns; ++c) {
    moments[c] = square[c];
    moments[kProxyColumns + c] = deviation[c];
  }
  sum_into(sums.moments[warp()][0], true, moments);
  __syncthreads();
  const float share = 1.0f / static_cast<float>(width);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kProxyColumns; i += kThreads) {
    const int row = i / kProxyColumns, c = i % kProxyColumns;
    if (first_column + c >= columns) continue;
    float product = over_warps([&](int w) { return sums.products[w][row][c]; });
    float variance = over_warps([&](int w) { return sums.moments[w][0][c]; }) * share;
    if (problem.centered) {
      const float from_pivot = over_warps([&](int w) { return sums.moments[w][1][c]; }) * share;  // μ − pivot
      product -= from_pivot * over_warps([&](int w) { return sums.query[w][row]; });
      variance = fmaxf(variance - from_pivot * from_pivot, 0.0f);
    }
    problem.map[(b * problem.targets + first_row + row) * problem.columns + first_column + c] =
        product / sqrtf(variance + problem.eps);
  }
}

// x·y of a probability x, 0 where it is.
__device__ inline float times(float probability, float y) {
  return probability == 0.0f ? 0.0f : probability * y;
}

// In shared memory, of each warp.
struct MapSums {
  float largest[kWarps];
  float sums[kWarps][4];
  float uncertain[kWarps];
};

// Grid: (N, B). With l = log m, up to a constant for softmax, and p = exp(l − log Σ exp l) the entropy is
// log Σ exp(l − largest) − Σ exp(l − largest)·(l − largest) / Σ exp(l − largest), which one reading of the scores
// gives.
static __global__ void __launch_bounds__(kThreads) proxy_relevancy_maps(const ProxyRelevancy problem) {
  constexpr int kBatch = 8;  // scores that a thread reads at a time
  const int64_t b = blockIdx.y, target = b * problem.targets + blockIdx.x;
  const int columns = columns_of(problem, b), thread = static_cast<int>(threadIdx.x);
  const float offset = problem.offset[target];
  float* const map = problem.map + target * problem.columns;
  for (int64_t j = columns + thread; j < problem.columns; j += kThreads) map[j] = 0.0f;
  ptx::wait_for_kernel_before();

  // Of this thread's columns. Less than any l, and still subtracted from without NaN.
  float largest = -3e38f;
  float total = 0.0f, weighted = 0.0f;  // Σ exp(l − largest), Σ exp(l − largest)·(l − largest)
  float uncertain = 0.0f;               // Σ of the columns' own entropies
  const auto raise = [&](float to) {
    const float factor = expf(largest - to);
    weighted = factor * (weighted + total * (largest - to));
    total *= factor;
    largest = to;
  };
#pragma unroll 1
  for (int first = thread; first < columns; first += kBatch * kThreads) {
    float logarithm[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int j = first + i * kThreads;
      logarithm[i] = j < columns ? map[j] + offset : 0.0f;
    }
    float batch_largest = largest;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int j = first + i * kThreads;
      if (j >= columns) continue;
      if (!problem.softmax) {
        const float score = logarithm[i], rest = expf(-fabsf(score)), soft = log1pf(rest);  // softplus(−|s|)
        const float least = rest / (1.0f + rest);                                           // sigmoid(−|s|)
        logarithm[i] = fminf(score, 0.0f) - soft;
        map[j] = score < 0.0f ? least : 1.0f / (1.0f + rest);
        uncertain += soft + times(least, fabsf(score));
      }
      batch_largest = fmaxf(batch_largest, logarithm[i]);
    }
    raise(batch_largest);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kThreads >= columns) continue;
      const float below = logarithm[i] - largest, power = expf(below);
      total += power;
      weighted += times(power, below);
    }
  }

  extern __shared__ __align__(16) unsigned char shared_memory[];
  MapSums& block = *reinterpret_cast<MapSums*>(shared_memory);
  float block_largest = largest;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    block_largest = fmaxf(block_largest, __shfl_xor_sync(~0u, block_largest, step));
  }
  if (lane() == 0) block.largest[warp()] = block_largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) block_largest = fmaxf(block_largest, block.largest[w]);
  raise(block_largest);
  float sums[4] = {total, weighted, uncertain, 0.0f};
  sum_into(block.sums[warp()], true, sums);
  __syncthreads();
  total = over_warps([&](int w) { return block.sums[w][0]; });
  weighted = over_warps([&](int w) { return block.sums[w][1]; });
  uncertain = over_warps([&](int w) { return block.sums[w][2]; });

  const float log_total = logf(total);
  if (problem.softmax) {
    float own[1] = {};
#pragma unroll 4
    for (int j = thread; j < columns; j += kThreads) {
      const float logarithm = map[j] + offset - largest - log_total, m = expf(logarithm);
      map[j] = m;
      own[0] -= times(m, logarithm) + times(1.0f - m, log1pf(-m));
    }
    sum_into(block.uncertain + warp(), true, own);
    __syncthreads();
    uncertain = over_warps([&](int w) { return block.uncertain[w]; });
  }
  if (thread == 0) {
    constexpr float kLog2 = 0.693147181f;
    const float count = static_cast<float>(columns);
    problem.entropy[target] = columns > 1 ? (log_total - weighted / total) / logf(count) : 0.0f;
    problem.bernoulli[target] = columns > 0 ? uncertain / (count * kLog2) : 0.0f;
  }
}

template <typename States, typename Launch>
void launch_scores(const ProxyRelevancy& problem, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(blocks(problem.columns, kProxyColumns)),
                  static_cast<unsigned>(blocks(problem.targets, kProxyRows)), static_cast<unsigned>(problem.batch));
  launch(proxy_relevancy_scores<States>, grid, static_cast<int>(sizeof(ProxySums)), problem);
}

template <typename T, typename Launch>
void launch_scores_of(const ProxyRelevancy& problem, const Launch& launch) {
  const int64_t query_stride = problem.width;
  const bool wide = problem.width * bytes_of(problem.element) % 16 == 0 &&
                    starts_aligned(problem.hidden, problem.hidden_stride, 2, bytes_of(problem.element)) &&
                    starts_aligned(problem.query, &query_stride, 1, sizeof(float));
  if (problem.targets == 1) {
    wide ? launch_scores<WideStates<T, 1>>(problem, launch) : launch_scores<NarrowStates<T, 1>>(problem, launch);
  } else {
    wide ? launch_scores<WideStates<T, 4>>(problem, launch) : launch_scores<NarrowStates<T, 4>>(problem, launch);
  }
}

// Calls launch(kernel, grid, bytes of shared memory, arguments…) for each kernel that has anything to do;
// launch.overlapping(…) where it may begin before the kernel before it has ended.
template <typename Launch>
void launch_kernels(const ProxyRelevancy& problem, const Launch& launch) {
  const dim3 rows(static_cast<unsigned>(problem.targets), static_cast<unsigned>(problem.batch), 1);
  if (problem.columns == 0) {
    launch(proxy_relevancy_maps, rows, static_cast<int>(sizeof(MapSums)), problem);
    return;
  }
  switch (problem.element) {
    case Element::kFloat32:
      launch_scores_of<float>(problem, launch);
      break;
    case Element::kBFloat16:
      launch_scores_of<BFloat16>(problem, launch);
      break;
    case Element::kFloat16:
      launch_scores_of<Float16>(problem, launch);
      break;
  }
  launch.overlapping(proxy_relevancy_maps, rows, static_cast<int>(sizeof(MapSums)), problem);
}

}  // namespace fastxai::cuda
