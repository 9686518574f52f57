// Fused kernel: score tile, exponential, gradient tile, rectified product and column sum without leaving the core.
//
// Compiled once per instruction set (FASTXAI_ISA names it, FASTXAI_VECTOR_BYTES and FASTXAI_TILE_* shape it) with GCC
// and Clang vector extensions, so one source serves AVX-512, AVX2, SSE2 and NEON. Everything here has internal linkage
// and no standard-library template is used: an inline function compiled for AVX-512 must never be the copy that the
// linker keeps for the whole library.

#include "relevancy_product_kernel.h"

namespace fastxai::cpu {
namespace {

constexpr int kLanes = FASTXAI_VECTOR_BYTES / 4;
constexpr int kTileRows = FASTXAI_TILE_ROWS;
constexpr int kTileVectors = FASTXAI_TILE_VECTORS;
constexpr int kPanel = kTileVectors * kLanes;  // keys that one tile spans

typedef float Floats __attribute__((vector_size(FASTXAI_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FASTXAI_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FASTXAI_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(FASTXAI_VECTOR_BYTES / 2)));
typedef Floats FloatsAnywhere __attribute__((aligned(4), may_alias));
typedef Halves HalvesAnywhere __attribute__((aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats load(const float* source) {
  return *reinterpret_cast<const FloatsAnywhere*>(source);
}

inline Floats load(const BFloat16* source) {
  const Halves bits = *reinterpret_cast<const HalvesAnywhere*>(source);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline Floats load(const Float16* source) {
  const Words bits = __builtin_convertvector(*reinterpret_cast<const HalvesAnywhere*>(source), Words);
  // Shifted into float32's fields the exponent is 112 too small; the multiplication also normalises subnormals.
  const Floats magnitude = (Floats)((bits & 0x7fffu) << 13) * 0x1p112f;
  const Words special = (Words)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Floats)((Words)magnitude | special | ((bits & 0x8000u) << 16));
}

inline float load_one(const float* source) {
  return *source;
}

template <typename T>
inline float load_one(const T* source) {
  T padded[kLanes] = {*source};
  return load(padded)[0];
}

// 2^x within 2 ulp for |x| < 126; 0 below that, infinity above, NaN for NaN.
inline Floats exp2(Floats x) {
  x = x > 128.0f ? 128.0f - Floats{} : x;
  x = x < -126.0f ? -127.0f - Floats{} : x;
  // Adding 1.5·2^23 rounds to an integer, which stands in the low bits of the sum together with the exponent's bias.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  const Floats shifted = x + kShift;
  const Floats fraction = x - (shifted - kShift);  // in [-0.5, 0.5]
  // Minimax polynomial of 2^f on that interval.
  Floats power = fraction * 1.535336188319500e-4f + 1.339887440266574e-3f;
  power = power * fraction + 9.618437357674640e-3f;
  power = power * fraction + 5.550332471162809e-2f;
  power = power * fraction + 2.402264791363012e-1f;
  power = power * fraction + 6.931472028550421e-1f;
  power = power * fraction + 1.0f;
  return power * (Floats)((Ints)shifted << 23);
}

// rows[r] (kTileRows × width, row by row) times the first kVectors vectors of a panel (width × kPanel). The sums are
// handed to finish(r, v, sum) while they are still in registers.
template <int kVectors, typename Finish>
inline void multiply_tile(const float* rows, const float* panel, int64_t width, const Finish& finish) {
  Floats sum[kTileRows][kVectors] = {};
  for (int64_t k = 0; k < width; ++k) {
    Floats right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Floats*>(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      // Subtracting zero changes no value, so it costs nothing; adding zero would, since -0 + 0 = +0.
      const Floats left = rows[r * width + k] - Floats{};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) finish(r, v, sum[r][v]);
  }
}

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

inline int64_t minimum(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t maximum(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

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

template <int... kIndex>
struct Lanes {};
template <int kCount, int... kIndex>
struct CountLanes : CountLanes<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct CountLanes<0, kIndex...> {
  using type = Lanes<kIndex...>;
};

// Lanes of a and b in turn, from lane kFirst of each.
template <int kFirst, int... kIndex>
inline Floats zip(Floats a, Floats b, Lanes<kIndex...>) {
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * kLanes)...);
}

// Zipping the first half of the rows with the second log2(kLanes) times transposes the block.
inline void transpose(Floats block[kLanes]) {
  using Every = typename CountLanes<kLanes>::type;
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Floats zipped[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip<0>(block[i], block[i + kLanes / 2], Every{});
      zipped[2 * i + 1] = zip<kLanes / 2>(block[i], block[i + kLanes / 2], Every{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = zipped[i];
  }
}

// Keys of a head, transposed into panels of (d, kPanel), converted to float32, the tail filled with zeros.
template <typename T>
void pack_panels(const T* source, int64_t stride, int64_t count, int64_t width, float* panels) {
  for (int64_t first = 0; first < round_up(count, kPanel); first += kLanes) {
    float* panel = panels + first / kPanel * kPanel * width + first % kPanel;
    const T* from = source + first * stride;
    const int64_t present = maximum(0, minimum(kLanes, count - first));
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int key = 0; key < kLanes; ++key) block[key] = key < present ? load(from + key * stride + k) : Floats{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Floats*>(panel + (k + i) * kPanel) = block[i];
    }
    for (; k < width; ++k) {
      for (int key = 0; key < kLanes; ++key) {
        panel[k * kPanel + key] = key < present ? load_one(from + key * stride + k) : 0.0f;
      }
    }
  }
}

template <typename T>
void copy_row(const T* source, int64_t width, float* target) {
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) *reinterpret_cast<FloatsAnywhere*>(target + k) = load(source + k);
  for (; k < width; ++k) target[k] = load_one(source + k);
}

void clear(float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = 0.0f;
}

// Gathers the next rows that see any key of [first_key, last_key); returns how many were found.
template <typename T>
int gather(const RelevancyProduct& problem, const ActiveRows& rows, int64_t sample, int64_t head, int64_t first_key,
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

// Keeps NaN, as torch.clamp does.
inline Floats rectified(Floats product) {
  return product < 0.0f ? Floats{} : product;
}

inline Ints count_lanes() {
  Ints lanes = {};
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
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
    Floats share = weight[r] * product;
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
  multiply_tile<kVectors>(group.query, scratch.keys + panel_offset * width, width, [&](int r, int v, Floats score) {
    probability[r][v] = exp2(score * scale - group.logsumexp[r]);
  });
  if (problem.grad_targets > 1 || problem.targets == 1) {
    for (int64_t n = 0; n < problem.targets; ++n) {
      const float* weight = group.weight + n * kTileRows;
      if (!any_weight(weight)) continue;
      ColumnSums<kVectors, kBoundary> columns(group, weight, first_key);
      multiply_tile<kVectors>(
          group.grad_output + n * kTileRows * width, values, width,
          [&](int r, int v, Floats gradient) { columns.add(r, v, rectified(probability[r][v] * gradient)); });
      columns.write(scratch.sums + n * block + panel_offset);
    }
    return;
  }
  // One gradient for all targets: its product replaces the probability and is weighted once per target.
  multiply_tile<kVectors>(group.grad_output, values, width, [&](int r, int v, Floats gradient) {
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
void run_typed(const RelevancyProduct& problem, const ActiveRows& rows, int64_t sample, int64_t head,
               int64_t block_index, float* memory, float* partial) {
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

void run(const RelevancyProduct& problem, const ActiveRows& rows, int64_t sample, int64_t head, int64_t block,
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

#define FASTXAI_JOIN_(a, b) a##b
#define FASTXAI_JOIN(a, b) FASTXAI_JOIN_(a, b)
#define FASTXAI_TEXT_(a) #a
#define FASTXAI_TEXT(a) FASTXAI_TEXT_(a)
const RelevancyProductKernel FASTXAI_JOIN(relevancy_product_, FASTXAI_ISA) = {FASTXAI_TEXT(FASTXAI_ISA), key_block,
                                                                              scratch_floats, run};

}  // namespace fastxai::cpu
