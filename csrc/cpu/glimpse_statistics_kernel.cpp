// Fused kernel: P and dP of a block of rows and keys, one head after the other, and their sums.
//
// The norm needs Σ_h dP of every entry before its magnitude is taken, so a block of rows × keys, small enough to stay
// in the cache beside one head's keys and values, waits until every head has been added. All other sums leave a tile as
// vectors. Where the domain holds keys that a row does not see, their tiles take one product instead of two.

#include "glimpse_statistics_kernel.h"

#include "vectors.h"

namespace fastxai::cpu {
namespace {

// Packing a head's keys and values costs about what a tile of rows does, gathering a tile of rows a fraction of a
// panel.
constexpr int64_t kKeyBlock = 192;
constexpr int64_t kGroups = 32;
constexpr int64_t kRowBlock = kGroups * kTileRows;
static_assert(kKeyBlock % kPanel == 0);

// One range of keys for each of kTileRows rows, counted from the block's first key.
struct Ranges {
  int32_t start[kTileRows], end[kTileRows];
  int64_t first, last;               // union
  int64_t common_start, common_end;  // intersection

  Ranges() : first(kKeyBlock), last(0), common_start(0), common_end(kKeyBlock) {}

  void set(int64_t r, int64_t from, int64_t to) {
    start[r] = static_cast<int32_t>(from);
    end[r] = static_cast<int32_t>(to);
    common_start = maximum(common_start, from);
    common_end = minimum(common_end, to);
    if (from >= to) return;
    first = minimum(first, from);
    last = maximum(last, to);
  }

  bool meet(int64_t offset) const { return first < offset + kPanel && last > offset; }
  bool cover(int64_t offset, int vectors) const {
    return common_start <= offset && common_end >= offset + vectors * kLanes;
  }
  inline Ints hold(int r, Ints key) const { return (key >= start[r]) & (key < end[r]); }
};

// kTileRows rows of one head.
struct Rows {
  float *query, *grad_output;  // (kTileRows, d)
  float logsumexp[kTileRows];  // in units of log 2
  Floats sum[kTileRows];       // of max(0, P·dP)
};

struct Block {
  float *keys, *values;                 // (panels, d, kPanel) of one key head
  float* gradient;                      // (kRowBlock, kKeyBlock), Σ_h dP
  Floats (*probability)[kTileVectors];  // (kTileRows, kTileVectors)
  Rows rows;
  Ranges seen[kGroups], summed[kGroups];
  bool any_seen, any_summed;
};

size_t scratch_floats(const GlimpseStatistics& problem) {
  return 2 * kKeyBlock * round_up(problem.width, 16) + kRowBlock * kKeyBlock + round_up(kTileRows * kPanel, 16) +
         2 * round_up(kTileRows * problem.width, 16);
}

void carve(const GlimpseStatistics& problem, float* memory, Block& block) {
  auto take = [&memory](int64_t floats) {
    float* piece = memory;
    memory += round_up(floats, 16);
    return piece;
  };
  block.keys = take(kKeyBlock * problem.width);
  block.values = take(kKeyBlock * problem.width);
  block.gradient = take(kRowBlock * kKeyBlock);
  block.probability = reinterpret_cast<Floats(*)[kTileVectors]>(take(kTileRows * kPanel));
  block.rows.query = take(kTileRows * problem.width);
  block.rows.grad_output = take(kTileRows * problem.width);
}

// The ranges of every row of the task within `count` keys from first_key on; rows that fill up a tile see none.
void set_ranges(const GlimpseStatistics& problem, const StatisticsTask& task, int64_t first_key, int64_t count,
                Block& block) {
  block.any_seen = block.any_summed = false;
  for (int64_t top = 0; top < task.rows.count; top += kTileRows) {
    Ranges &seen = block.seen[top / kTileRows], &summed = block.summed[top / kTileRows];
    seen = summed = Ranges();
    for (int64_t r = 0; r < kTileRows; ++r) {
      if (top + r >= task.rows.count) {
        seen.set(r, 0, 0);
        summed.set(r, 0, 0);
        continue;
      }
      const int64_t i = task.sample * problem.queries + task.rows.index[top + r];
      seen.set(r, maximum(problem.key_start[i] - first_key, 0), minimum(problem.key_end[i] - first_key, count));
      summed.set(r, maximum(problem.sum_start[i] - first_key, 0), minimum(problem.sum_end[i] - first_key, count));
    }
    block.any_seen |= seen.last > 0;
    block.any_summed |= summed.last > 0;
  }
}

// Into the second-level cache; rows of a model's tensors lie so far apart that they would share a set of the first.
template <typename T>
void prefetch_row(const T* row, int64_t width) {
  for (int64_t k = 0; k < width; k += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + k, 0, 2);
}

template <typename T>
void gather(const GlimpseStatistics& problem, const StatisticsTask& task, int64_t head, int64_t top, bool scored,
            Rows& rows) {
  const int64_t width = problem.width;
  const T* query =
      static_cast<const T*>(problem.query) + task.sample * problem.query_stride[0] + head * problem.query_stride[1];
  const T* grad_output = static_cast<const T*>(problem.grad_output) + task.sample * problem.grad_stride[0] +
                         task.target * problem.grad_stride[1] + head * problem.grad_stride[2];
  const float* logsumexp = problem.logsumexp + (task.sample * problem.heads + head) * problem.queries;
  for (int64_t r = 0; r < kTileRows; ++r) {
    rows.sum[r] = Floats{};
    if (top + r >= task.rows.count) {
      rows.logsumexp[r] = 0.0f;
      clear(rows.query + r * width, width);
      clear(rows.grad_output + r * width, width);
      continue;
    }
    const int64_t i = task.rows.index[top + r];
    if (top + r + kTileRows < task.rows.count) {
      const int64_t later = task.rows.index[top + r + kTileRows];
      prefetch_row(grad_output + later * problem.grad_stride[3], width);
      if (scored) prefetch_row(query + later * problem.query_stride[2], width);
    }
    copy_row(grad_output + i * problem.grad_stride[3], width, rows.grad_output + r * width);
    if (!scored) continue;
    copy_row(query + i * problem.query_stride[2], width, rows.query + r * width);
    rows.logsumexp[r] = static_cast<float>(logsumexp[i] * 1.4426950408889634);
  }
}

template <int kVectors>
void score_tile(const GlimpseStatistics& problem, const Block& block, int64_t offset) {
  const float scale = problem.scale * 1.44269504f;
  multiply_tile<kVectors>(
      {block.rows.query, problem.width, 1}, block.keys + offset * problem.width, kPanel, problem.width,
      [&](int r, int v, Floats score) { block.probability[r][v] = exp2(score * scale - block.rows.logsumexp[r]); });
}

// dP of one tile and what it adds to every sum. kScored: some row sees some key, and score_tile has been there;
// kBoundary: some row does not see, or does not sum, some key of it.
template <int kVectors, bool kScored, bool kBoundary>
void gradient_tile(const GlimpseStatistics& problem, Block& block, int64_t group, int64_t offset, Floats& positive) {
  const Ranges &seen = block.seen[group], &summed = block.summed[group];
  const Ints first_lane = count_lanes() + static_cast<int32_t>(offset);
  float* const total = block.gradient + group * kTileRows * kKeyBlock + offset;
  Floats sum[kVectors] = {};
  multiply_tile<kVectors>({block.rows.grad_output, problem.width, 1}, block.values + offset * problem.width, kPanel,
                          problem.width, [&](int r, int v, Floats gradient) {
                            const Ints key = first_lane + v * kLanes;
                            Floats raised = rectified(gradient);
                            if (kScored) {
                              Floats share = block.probability[r][v] * raised;
                              if (kBoundary) share = seen.hold(r, key) ? share : Floats{};
                              block.rows.sum[r] += share;
                            }
                            if (kBoundary) {
                              gradient = summed.hold(r, key) ? gradient : Floats{};
                              raised = summed.hold(r, key) ? raised : Floats{};
                            }
                            sum[v] += raised;
                            *reinterpret_cast<Floats*>(total + r * kKeyBlock + v * kLanes) += gradient;
                          });
  for (int v = 0; v < kVectors; ++v) positive += sum[v];
}

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// Calls run(Count<v>) with the fewest vectors that hold `keys` keys; under a causal mask the last tile is rarely full.
template <int kVectors = 1, typename Run>
inline void with_vectors(int64_t keys, const Run& run) {
  if constexpr (kVectors < kTileVectors) {
    if (keys > kVectors * kLanes) return with_vectors<kVectors + 1>(keys, run);
  }
  run(Count<kVectors>{});
}

void add_tile(const GlimpseStatistics& problem, Block& block, int64_t group, int64_t offset, Floats& positive) {
  const Ranges &seen = block.seen[group], &summed = block.summed[group];
  const bool scored = seen.meet(offset);
  if (scored) {
    with_vectors(seen.last - offset, [&](auto count) { score_tile<count.value>(problem, block, offset); });
  }
  with_vectors(summed.last - offset, [&](auto count) {
    constexpr int kVectors = count.value;
    if (!scored && summed.cover(offset, kVectors)) {
      gradient_tile<kVectors, false, false>(problem, block, group, offset, positive);
    } else if (!scored) {
      gradient_tile<kVectors, false, true>(problem, block, group, offset, positive);
    } else if (seen.cover(offset, kVectors) && summed.cover(offset, kVectors)) {
      gradient_tile<kVectors, true, false>(problem, block, group, offset, positive);
    } else {
      gradient_tile<kVectors, true, true>(problem, block, group, offset, positive);
    }
  });
}

// Adds one head to the block's Σ_h dP and to its row sums; returns its sum of positive gradients.
template <typename T>
float add_head(const GlimpseStatistics& problem, const StatisticsTask& task, int64_t head, Block& block,
               float* row_sums) {
  Floats positive = {};
  for (int64_t top = 0; top < task.rows.count; top += kTileRows) {
    const int64_t group = top / kTileRows;
    const Ranges& summed = block.summed[group];
    if (summed.last == 0) continue;
    gather<T>(problem, task, head, top, block.seen[group].last > 0, block.rows);
    for (int64_t offset = summed.first / kPanel * kPanel; offset < summed.last; offset += kPanel) {
      add_tile(problem, block, group, offset, positive);
    }
    for (int64_t r = 0; r < kTileRows; ++r) row_sums[top + r] += sum_of_lanes(block.rows.sum[r]);
  }
  return sum_of_lanes(positive);
}

double sum_of_magnitudes(const float* gradient, int64_t rows) {
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    Floats sum = {};
    for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
      sum += (Floats)(*reinterpret_cast<const Words*>(gradient + r * kKeyBlock + j) & 0x7fffffffu);
    }
    total += sum_of_lanes(sum);
  }
  return total;
}

template <typename T>
void run_typed(const GlimpseStatistics& problem, const StatisticsTask& task, float* memory, float* row_sums,
               double* sums) {
  Block block;
  carve(problem, memory, block);
  clear(row_sums, problem.heads * kRowBlock);
  for (int64_t h = 0; h <= problem.heads; ++h) sums[h] = 0.0;
  const int64_t width = problem.width, group = problem.heads / problem.key_heads;
  const int64_t padded_rows = round_up(task.rows.count, kTileRows);
  for (int64_t first_key = task.first_block * kKeyBlock; first_key < problem.keys;
       first_key += task.block_step * kKeyBlock) {
    const int64_t count = minimum(kKeyBlock, problem.keys - first_key);
    set_ranges(problem, task, first_key, count, block);
    if (!block.any_summed) continue;
    clear(block.gradient, padded_rows * kKeyBlock);
    const T* keys =
        static_cast<const T*>(problem.key) + task.sample * problem.key_stride[0] + first_key * problem.key_stride[2];
    const T* values = static_cast<const T*>(problem.value) + task.sample * problem.value_stride[0] +
                      first_key * problem.value_stride[2];
    for (int64_t key_head = 0; key_head < problem.key_heads; ++key_head) {
      if (block.any_seen) {
        pack_panels(keys + key_head * problem.key_stride[1], problem.key_stride[2], count, width, block.keys);
      }
      pack_panels(values + key_head * problem.value_stride[1], problem.value_stride[2], count, width, block.values);
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        sums[head] += add_head<T>(problem, task, head, block, row_sums + head * kRowBlock);
      }
    }
    sums[problem.heads] += sum_of_magnitudes(block.gradient, task.rows.count);
  }
}

void run(const GlimpseStatistics& problem, const StatisticsTask& task, float* scratch, float* row_sums, double* sums) {
  switch (problem.element) {
    case Element::kFloat32:
      return run_typed<float>(problem, task, scratch, row_sums, sums);
    case Element::kBFloat16:
      return run_typed<BFloat16>(problem, task, scratch, row_sums, sums);
    case Element::kFloat16:
      return run_typed<Float16>(problem, task, scratch, row_sums, sums);
  }
}

}  // namespace

const GlimpseStatisticsKernel FASTXAI_NAME(glimpse_statistics) = {FASTXAI_ISA_NAME, kRowBlock, kKeyBlock,
                                                                  scratch_floats, run};

}  // namespace fastxai::cpu
