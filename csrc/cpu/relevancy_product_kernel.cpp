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
  x = x > 128.0f ? (Floats{} + 128.0f) : x;
  x = x < -126.0f ? (Floats{} - 127.0f) : x;
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

// rows[r] (kTileRows × width, row by row) times a panel (width × kPanel): tile[r][key].
inline void multiply_tile(const float* rows, const float* panel, int64_t width, Floats tile[kTileRows][kTileVectors]) {
  Floats sum[kTileRows][kTileVectors] = {};
  for (int64_t k = 0; k < width; ++k) {
    Floats right[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) right[v] = *reinterpret_cast<const Floats*>(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Floats left = Floats{} + rows[r * width + k];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) tile[r][v] = sum[r][v];
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
  Floats (*product)[kTileVectors];
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
         2 * round_up(kTileRows * kPanel, 16) + round_up(kTileRows * problem.width, 16) +
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
  scratch.product = reinterpret_cast<Floats(*)[kTileVectors]>(take(kTileRows * kPanel));
  scratch.group.query = take(kTileRows * problem.width);
  scratch.group.grad_output = take(problem.grad_targets * kTileRows * problem.width);
  scratch.group.weight = take(problem.targets * kTileRows);
  return scratch;
}

// Keys first … last of a head, transposed into panels of (d, kPanel), converted to float32, the tail filled with zeros.
template <typename T>
void pack_panels(const T* source, int64_t stride, int64_t count, int64_t width, float* panels) {
  for (int64_t first = 0; first < count; first += kPanel, panels += width * kPanel) {
    for (int64_t key = 0; key < kPanel; ++key) {
      if (first + key >= count) {
        for (int64_t k = 0; k < width; ++k) panels[k * kPanel + key] = 0.0f;
        continue;
      }
      const T* from = source + (first + key) * stride;
      int64_t k = 0;
      for (; k + kLanes <= width; k += kLanes) {
        const Floats values = load(from + k);
        for (int lane = 0; lane < kLanes; ++lane) panels[(k + lane) * kPanel + key] = values[lane];
      }
      for (; k < width; ++k) panels[k * kPanel + key] = load_one(from + k);
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

// Turns the gradient tile into max(0, probability · gradient).
inline void rectify(const Floats probability[kTileRows][kTileVectors], Floats tile[kTileRows][kTileVectors]) {
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      const Floats product = probability[r][v] * tile[r][v];
      tile[r][v] = product < 0.0f ? Floats{} : product;  // keeps NaN, as torch.clamp does
    }
  }
}

// Adds weight · tile to the column sums. kBoundary: some row does not see some key of the tile.
template <bool kBoundary>
inline void add_columns(const RowGroup& group, const float* weight, int64_t first_key,
                        const Floats tile[kTileRows][kTileVectors], float* sums) {
  Floats column[kTileVectors] = {};
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < kTileRows; ++r) {
    if (weight[r] == 0.0f) continue;
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      const Floats share = weight[r] * tile[r][v];
      if (kBoundary) {
        // A hidden key gets nothing, not even from a weight that is not finite.
        const Ints key = lane + static_cast<int32_t>(first_key + v * kLanes);
        column[v] += (key >= group.start[r]) & (key < group.end[r]) ? share : Floats{};
      } else {
        column[v] += share;
      }
    }
  }
  for (int v = 0; v < kTileVectors; ++v) *reinterpret_cast<Floats*>(sums + v * kLanes) += column[v];
}

inline bool any_weight(const float* weight) {
  for (int r = 0; r < kTileRows; ++r) {
    if (weight[r] != 0.0f) return true;
  }
  return false;
}

// Adds what one group of rows gives to one panel of keys, for every target.
void add_tile(const RelevancyProduct& problem, const Scratch& scratch, int64_t block, int64_t panel_offset,
              int64_t first_key) {
  const RowGroup& group = scratch.group;
  const int64_t width = problem.width;
  const float* values = scratch.values + panel_offset * width;
  const bool boundary = group.common_start > first_key || group.common_end < first_key + kPanel;

  multiply_tile(group.query, scratch.keys + panel_offset * width, width, scratch.probability);
  const float scale = problem.scale * 1.44269504f;
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      scratch.probability[r][v] = exp2(scratch.probability[r][v] * scale - group.logsumexp[r]);
    }
  }
  const bool shared_gradient = problem.grad_targets == 1;
  for (int64_t n = 0; n < problem.targets; ++n) {
    const float* weight = group.weight + n * kTileRows;
    if (!shared_gradient && !any_weight(weight)) continue;
    if (!shared_gradient || n == 0) {
      multiply_tile(group.grad_output + n * kTileRows * width, values, width, scratch.product);
      rectify(scratch.probability, scratch.product);
    }
    float* sums = scratch.sums + n * block + panel_offset;
    if (boundary) {
      add_columns<true>(group, weight, first_key, scratch.product, sums);
    } else {
      add_columns<false>(group, weight, first_key, scratch.product, sums);
    }
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
      add_tile(problem, scratch, block, offset, first_key + offset);
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
