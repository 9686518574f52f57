// Vectors, conversions and register tiles that the CPU kernels share.
//
// A kernel is compiled once per instruction set (FASTXAI_ISA names it, FASTXAI_VECTOR_BYTES and FASTXAI_TILE_* shape
// it) with GCC and Clang vector extensions, so one source serves AVX-512, AVX2, SSE2 and NEON. Everything here has
// internal linkage and no standard-library template is used: an inline function compiled for AVX-512 must never be the
// copy that the linker keeps for the whole library.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTXAI_JOIN_(a, b) a##_##b
#define FASTXAI_JOIN(a, b) FASTXAI_JOIN_(a, b)
#define FASTXAI_TEXT_(a) #a
#define FASTXAI_TEXT(a) FASTXAI_TEXT_(a)
// What a kernel is called outside: its name and the instruction set it was compiled for.
#define FASTXAI_NAME(kernel) FASTXAI_JOIN(kernel, FASTXAI_ISA)
#define FASTXAI_ISA_NAME FASTXAI_TEXT(FASTXAI_ISA)

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
typedef Words WordsAnywhere __attribute__((aligned(2), may_alias));
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
#if FASTXAI_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif FASTXAI_VECTOR_BYTES == 32
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  const Words bits = __builtin_convertvector(*reinterpret_cast<const HalvesAnywhere*>(source), Words);
  // Shifted into float32's fields the exponent is 112 too small; the multiplication also normalises subnormals.
  const Floats magnitude = (Floats)((bits & 0x7fffu) << 13) * 0x1p112f;
  const Words special = (Words)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Floats)((Words)magnitude | special | ((bits & 0x8000u) << 16));
#endif
}

inline float load_one(const float* source) {
  return *source;
}

template <typename T>
inline float load_one(const T* source) {
  T padded[kLanes] = {*source};
  return load(padded)[0];
}

// The product as it stands alone. A compiler that may contract expressions fuses it with the sum that it is added to in
// some places and not in others, and the same sum has other last bits there: AVX2's differed between targets that share
// a gradient and targets that do not.
inline Floats rounded(Floats product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// Rounded to the nearest, ties to even.
inline void store_one(float value, float* target) {
  *target = value;
}

inline void store_one(float value, BFloat16* target) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  target->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store_one(float value, Float16* target) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits >= 0x47800000u) {  // 65536 and above, and NaN
    half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal in half precision: the last place of 0.5f is that of its subnormals
    float shifted;
    __builtin_memcpy(&shifted, &bits, sizeof(bits));
    shifted += 0.5f;
    __builtin_memcpy(&half, &shifted, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
  }
  target->bits = static_cast<uint16_t>(sign | half);
}

// The larger and the smaller of two, x where either is NaN: one instruction, where GCC makes two of a comparison. Its
// unmasked ones for AVX-512 trip its own warning of uninitialised values.
inline Floats larger(Floats bound, Floats x) {
#if FASTXAI_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x);
#elif FASTXAI_VECTOR_BYTES == 32
  return (Floats)_mm256_max_ps((__m256)bound, (__m256)x);
#elif defined(__x86_64__)
  return (Floats)_mm_max_ps((__m128)bound, (__m128)x);
#else
  return bound > x ? bound : x;
#endif
}

inline Floats smaller(Floats bound, Floats x) {
#if FASTXAI_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)bound, (__m512)x);
#elif FASTXAI_VECTOR_BYTES == 32
  return (Floats)_mm256_min_ps((__m256)bound, (__m256)x);
#elif defined(__x86_64__)
  return (Floats)_mm_min_ps((__m128)bound, (__m128)x);
#else
  return bound < x ? bound : x;
#endif
}

// 2^x within 2 ulp for |x| < 126; 0 below that, infinity above, NaN for NaN.
inline Floats exp2(Floats x) {
  x = larger(-127.0f - Floats{}, smaller(128.0f - Floats{}, x));
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

// A matrix whose element (i, k) stands at data[i * stride + k * depth_stride].
struct Left {
  const float* data;
  int64_t stride, depth_stride;
};

// kTileRows rows of `left` times kVectors vectors of `right`, whose rows lie right_stride apart. The sums are handed to
// finish(r, v, sum) while they are still in registers.
template <int kVectors, typename Finish>
inline void multiply_tile(Left left, const float* right, int64_t right_stride, int64_t depth, const Finish& finish) {
  Floats sum[kTileRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats across[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      across[v] = *reinterpret_cast<const Floats*>(right + k * right_stride + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      // Subtracting zero changes no value, so it costs nothing; adding zero would, since -0 + 0 = +0.
      const Floats down = left.data[r * left.stride + k * left.depth_stride] - Floats{};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += down * across[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) finish(r, v, sum[r][v]);
  }
}

inline int64_t minimum(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t maximum(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
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

template <typename T>
void store_row(const float* source, int64_t width, T* target) {
  for (int64_t k = 0; k < width; ++k) store_one(source[k], target + k);
}

void clear(float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = 0.0f;
}

// Keeps NaN, as torch.clamp does.
inline Floats rectified(Floats product) {
  return larger(Floats{}, product);
}

// Halves added to halves.
inline float sum_of_lanes(Floats sum) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &sum, sizeof(sum));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

inline Ints count_lanes() {
  Ints lanes = {};
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

}  // namespace
}  // namespace fastxai::cpu
