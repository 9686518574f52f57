// Fused kernel: score tile, exponential, gradient tile, rectified product and column sum without leaving the core.

#include "relevancy_product_kernel.h"

#include "vectors.h"

namespace fastxai::cpu {
namespace {

// One group of kTileRows query rows, as the tiles want them.
struct RowGroup {
  float* query;                // (kTileRows, d)
  float* grad_output;          // (N or 1, kTileRows, d)
  float* weight;               // (N, kTileRows)
  float logsumexp[kTileRows];  // in units of log 2
  int32_t start[kTileRows], end[kTileRows];
  int64_t first_key, last_key;       // union of the ranges
  int64_t common_start, common_end;  // intersection of the ranges
};

struct Scratch {
  float *keys, *values;  // (panels, d, kPanel)
  float* sums;           // (N, key block)
  Floats (*probability)[kTileVectors];
  RowGroup group;
};

int64_t key_block(const RelevancyProduct& problem) {
  // Panels of keys and values fill a quarter of a 1 MiB L2 cache.
  const int64_t panels = (256 << 10) / (2 * sizeof(float) * kPanel * problem.width);
  const int64_t wanted = maximum(1, minimum(panels, 512 / kPanel));
  return minimum(wanted, maximum(1, round_up(problem.keys, kPanel) / kPanel)) * kPanel;
}

size_t scratch_floats(const RelevancyProduct& problem) {
  const int64_t block = key_block(problem);
  return 2 * round_up(block * problem.width, 16) + round_up(problem.targets * block, 16) +
         round_up(kTileRows * kPanel, 16) + round_up(kTileRows * problem.width, 16) +
         round_up(problem.grad_targets * kTileRows * problem.width, 16) + round_up(problem.targets * kTileRows, 16);
}

Scratch carve(const RelevancyProduct& problem, int64_t block, float* memory) {
  Scratch scratch;
  auto take = [&memory](int64_t floats) {
    float* piece = memory;
    memory += round_up(floats, 16);
    return piece;
  };
  scratch.keys = take(block * problem.width);
  scratch.values = take(block * problem.width);
  scratch.sums = take(problem.targets * block);
  scratch.probability = reinterpret_cast<Floats(*)[kTileVectors]>(take(kTileRows * kPanel));
  scratch.group.query = take(kTileRows * problem.width);
  scratch.group.grad_output = take(problem.grad_targets * kTileRows * problem.width);
  scratch.group.weight = take(problem.targets * kTileRows);
  return scratch;
}

// Gathers the next rows that see any key of [first_key, last_key); returns how many were found.
template <typename T>
int gather(const RelevancyProduct& problem, const RowList& rows, int64_t sample, int64_t head, int64_t first_key,
           int64_t last_key, int64_t& next, RowGroup& group) {
  const int64_t width = problem.width;
  const T* query =
      static_cast<const T*>(problem.query) + sample * problem.query_stride[0] + head * problem.query_stride[1];
  const T* grad_output =
      static_cast<const T*>(problem.grad_output) + sample * problem.grad_stride[0] + head * problem.grad_stride[2];
  const float* logsumexp = problem.logsumexp + (sample * problem.heads + head) * problem.queries;
  const float* weight = problem.row + sample * problem.targets * problem.queries;
  group.first_key = problem.keys;
  group.last_key = 0;
  group.common_start = 0;
  group.common_end = problem.keys;

  int found = 0;
  for (; next < rows.count && found < kTileRows; ++next) {
    const int64_t i = rows.index[next];
    const int64_t start = maximum(problem.key_start[sample * problem.queries + i], 0);
    const int64_t end = minimum(problem.key_end[sample * problem.queries + i], problem.keys);
    if (start >= last_key || end <= first_key) continue;
    group.start[found] = static_cast<int32_t>(start);
    group.end[found] = static_cast<int32_t>(end);
    group.first_key = minimum(group.first_key, start);
    group.last_key = maximum(group.last_key, end);
    group.common_start = maximum(group.common_start, start);
    group.common_end = minimum(group.common_end, end);
    group.logsumexp[found] = static_cast<float>(logsumexp[i] * 1.4426950408889634);
    copy_row(query + i * problem.query_stride[2], width, group.query + found * width);
    for (int64_t n = 0; n < problem.grad_targets; ++n) {
      copy_row(grad_output + n * problem.grad_stride[1] + i * problem.grad_stride[3], width,
               group.grad_output + (n * kTileRows + found) * width);
    }
    for (int64_t n = 0; n < problem.targets; ++n) group.weight[n * kTileRows + found] = weight[n * problem.queries + i];
    ++found;
  }
  for (int r = found; found > 0 && r < kTileRows; ++r) {
    group.start[r] = group.end[r] = 0;
    group.logsumexp[r] = 0.0f;
    clear(group.query + r * width, width);
    for (int64_t n = 0; n < problem.grad_targets; ++n) clear(group.grad_output + (n * kTileRows + r) * width, width);
    for (int64_t n = 0; n < problem.targets; ++n) group.weight[n * kTileRows + r] = 0.0f;
  }
  return found;
}

// Weighted column sums of a tile. kBoundary: some row does not see some key of it.
template <int kVectors, bool kBoundary>
struct ColumnSums {
  const RowGroup& group;
  const float* weight;
  Ints first_lane;
  Floats sum[kVectors] = {};

  ColumnSums(const RowGroup& rows, const float* row_weight, int64_t first_key)
      : group(rows), weight(row_weight), first_lane(count_lanes() + static_cast<int32_t>(first_key)) {}

  inline void add(int r, int v, Floats product) {
    Floats share = rounded(weight[r] * product);
    if (kBoundary) {
      // A hidden key gets nothing, not even from a weight that is not finite.
      const Ints key = first_lane + v * kLanes;
      share = (key >= group.start[r]) & (key < group.end[r]) ? share : Floats{};
    }
    sum[v] += weight[r] == 0.0f ? Floats{} : share;
  }

  inline void write(float* sums) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Floats*>(sums + v * kLanes) += sum[v];
  }
};

inline bool any_weight(const float* weight) {
  for (int r = 0; r < kTileRows; ++r) {
    if (weight[r] != 0.0f) return true;
  }
  return false;
}

// Adds what one group of rows gives to the first kVectors vectors of one panel of keys, for every target.
template <int kVectors, bool kBoundary>
void add_tile(const RelevancyProduct& problem, const Scratch& scratch, int64_t block, int64_t panel_offset,
              int64_t first_key) {
  const RowGroup& group = scratch.group;
  const int64_t width = problem.width;
  const float* values = scratch.values + panel_offset * width;
  const float scale = problem.scale * 1.44269504f;

  auto* const probability = scratch.probability;
  multiply_tile<kVectors>(
      {group.query, width, 1}, scratch.keys + panel_offset * width, kPanel, width,
      [&](int r, int v, Floats score) { probability[r][v] = exp2(score * scale - group.logsumexp[r]); });
  if (problem.grad_targets > 1 || problem.targets == 1) {
    for (int64_t n = 0; n < problem.targets; ++n) {
      const float* weight = group.weight + n * kTileRows;
      if (!any_weight(weight)) continue;
      ColumnSums<kVectors, kBoundary> columns(group, weight, first_key);
      multiply_tile<kVectors>(
          {group.grad_output + n * kTileRows * width, width, 1}, values, kPanel, width,
          [&](int r, int v, Floats gradient) { columns.add(r, v, rectified(probability[r][v] * gradient)); });
      columns.write(scratch.sums + n * block + panel_offset);
    }
    return;
  }
  // One gradient for all targets: its product replaces the probability and is weighted once per target.
  multiply_tile<kVectors>({group.grad_output, width, 1}, values, kPanel, width, [&](int r, int v, Floats gradient) {
    probability[r][v] = rectified(probability[r][v] * gradient);
  });
  for (int64_t n = 0; n < problem.targets; ++n) {
    ColumnSums<kVectors, kBoundary> columns(group, group.weight + n * kTileRows, first_key);
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) columns.add(r, v, probability[r][v]);
    }
    columns.write(scratch.sums + n * block + panel_offset);
  }
}

// The narrowest tile that holds `visible` keys; under a causal mask the last tile of a row group is rarely full.
template <int kVectors = 1>
inline void add_narrowest_tile(const RelevancyProduct& problem, const Scratch& scratch, int64_t block,
                               int64_t panel_offset, int64_t first_key, int64_t visible) {
  if constexpr (kVectors < kTileVectors) {
    if (visible > kVectors * kLanes) {
      return add_narrowest_tile<kVectors + 1>(problem, scratch, block, panel_offset, first_key, visible);
    }
  }
  const RowGroup& group = scratch.group;
  if (group.common_start > first_key || group.common_end < first_key + kVectors * kLanes) {
    add_tile<kVectors, true>(problem, scratch, block, panel_offset, first_key);
  } else {
    add_tile<kVectors, false>(problem, scratch, block, panel_offset, first_key);
  }
}

template <typename T>
void run_typed(const RelevancyProduct& problem, const RowList& rows, int64_t sample, int64_t head, int64_t block_index,
               float* memory, float* partial) {
  const int64_t block = key_block(problem);
  const int64_t first_key = block_index * block;
  const int64_t count = minimum(block, problem.keys - first_key);
  const int64_t key_head = head / (problem.heads / problem.key_heads);
  Scratch scratch = carve(problem, block, memory);
  clear(scratch.sums, problem.targets * block);

  bool packed = false;
  int64_t next = 0;
  while (gather<T>(problem, rows, sample, head, first_key, first_key + count, next, scratch.group) > 0) {
    if (!packed) {
      const T* key = static_cast<const T*>(problem.key) + sample * problem.key_stride[0] +
                     key_head * problem.key_stride[1] + first_key * problem.key_stride[2];
      const T* value = static_cast<const T*>(problem.value) + sample * problem.value_stride[0] +
                       key_head * problem.value_stride[1] + first_key * problem.value_stride[2];
      pack_panels(key, problem.key_stride[2], count, problem.width, scratch.keys);
      pack_panels(value, problem.value_stride[2], count, problem.width, scratch.values);
      packed = true;
    }
    const int64_t begin = maximum(scratch.group.first_key - first_key, 0) / kPanel * kPanel;
    const int64_t end = minimum(scratch.group.last_key - first_key, count);
    for (int64_t offset = begin; offset < end; offset += kPanel) {
      add_narrowest_tile(problem, scratch, block, offset, first_key + offset, end - offset);
    }
  }
  for (int64_t n = 0; n < problem.targets; ++n) {
    for (int64_t j = 0; j < count; ++j) partial[n * problem.keys + first_key + j] = scratch.sums[n * block + j];
  }
}

void run(const RelevancyProduct& problem, const RowList& rows, int64_t sample, int64_t head, int64_t block,
         float* scratch, float* partial) {
  switch (problem.element) {
    case Element::kFloat32:
      return run_typed<float>(problem, rows, sample, head, block, scratch, partial);
    case Element::kBFloat16:
      return run_typed<BFloat16>(problem, rows, sample, head, block, scratch, partial);
    case Element::kFloat16:
      return run_typed<Float16>(problem, rows, sample, head, block, scratch, partial);
  }
}

}  // namespace

const RelevancyProductKernel FASTXAI_NAME(relevancy_product) = {FASTXAI_ISA_NAME, key_block, scratch_floats, run};

}  // namespace fastxai::cpu
