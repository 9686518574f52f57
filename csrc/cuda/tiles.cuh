// Products of a block of rows with the tiles of rows that stream past it, on tensor cores or without. Each thread holds
// the part of the product that two functions name (key(i) and query(i), or left(i) and right(i)), so a kernel reads the
// same for both.
#pragma once

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace fastxai::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 32;

__device__ inline int smaller(int a, int b) {
  return a < b ? a : b;
}
__device__ inline int larger(int a, int b) {
  return a > b ? a : b;
}

// Of this thread.
__device__ inline int lane() {
  return static_cast<int>(threadIdx.x) % 32;
}
__device__ inline int warp() {
  return static_cast<int>(threadIdx.x) / 32;
}

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float widened;
  memcpy(&widened, &bits, sizeof(widened));
  return widened;
}
__device__ inline float to_float(Float16 value) {
  return ptx::widened(value.bits);
}

template <typename T>
__device__ inline T narrowed(float value);
template <>
__device__ inline float narrowed<float>(float value) {
  return value;
}
template <>
__device__ inline BFloat16 narrowed<BFloat16>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  // Half a unit in the last place, a little less for even numbers. Carried on, it would turn some NaN into zero.
  const uint32_t rounded = (value != value ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(rounded)};
}
template <>
__device__ inline Float16 narrowed<Float16>(float value) {
  return {ptx::narrowed(value)};
}

// The rows of a matrix from one row on; its columns are contiguous.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int count;  // rows from `data` to the matrix's last
};

// (…, S, d) at one sample and head, from its row `first` on.
template <typename T>
__device__ inline Rows<T> rows_from(const void* tensor, int64_t offset, int64_t stride, int first, int64_t count) {
  return {static_cast<const T*>(tensor) + offset + first * stride, stride, static_cast<int>(count) - first};
}

// How wide rows are, and whether all of them start at a multiple of 16 bytes.
struct RowShape {
  int width;
  bool aligned;
};

// Has the block copy kRows × kChunks·16 bytes to shared memory, from a column on. Rows past the last repeat it: what
// they add is dropped later. Columns past the width are zero, so that they add nothing to a product.
template <int kRows, int kChunks, typename T>
__device__ inline void copy_rows(const Rows<T>& rows, int first_column, RowShape shape, unsigned char* shared,
                                 int pitch) {
  constexpr int kElements = 16 / sizeof(T);
  const auto copy = [&](int chunk, const auto& copy_elements) {
    const int row = chunk / kChunks, column = first_column + chunk % kChunks * kElements;
    copy_elements(reinterpret_cast<T*>(shared + row * pitch + chunk % kChunks * 16),
                  rows.data + (row < rows.count ? row : rows.count - 1) * rows.stride + column,
                  smaller(larger(shape.width - column, 0), kElements));
  };
  static_assert(kRows * kChunks % kThreads == 0);
  const int thread = ptx::thread();
  if (shape.aligned) {
#pragma unroll 4
    for (int i = 0; i < kRows * kChunks; i += kThreads) {
      copy(i + thread, [](T* target, const T* source, int present) {
        ptx::copy16(target, source, present * static_cast<int>(sizeof(T)));
      });
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows * kChunks; i += kThreads) {
      copy(i + thread, [](T* target, const T* source, int present) {
#pragma unroll 1
        for (int e = 0; e < kElements; ++e) target[e] = e < present ? source[e] : T{};
      });
    }
  }
}

// product (16 rows × 16) += left (16×16) · right (16×16), whose first two registers are columns 0-7. The product's
// halves of eight rows are kept apart.
template <typename T>
__device__ inline void multiply_add_16(float* upper, float* lower, const uint32_t (&left)[4],
                                       const uint32_t (&right)[4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    ptx::multiply_add<T>(upper[2 * n], upper[2 * n + 1], lower[2 * n], lower[2 * n + 1], left, right[2 * n],
                         right[2 * n + 1]);
  }
}

// 16-bit elements on tensor cores, from sm_80. A warp keeps its keys and values in registers for good, as the left
// operand; tiles of rows pass by in a ring of stages in shared memory, which copies fill ahead of time. Keys are the
// product's rows, so that a sum over query rows stays within four lanes.
template <typename T, int kWidth>
class TensorCoreTiles {
  // Keys and values of 16 keys take kWidth / 2 registers: 128 of a thread's 255 for widths of 128 and 256.
  static constexpr int kSlabs = kWidth <= 128 ? 2 : 1;
  static constexpr int kDepth = kWidth / 16;
  static constexpr int kStages = 4;
  // An odd multiple of 16 bytes: eight rows of a matrix then lie in different banks.
  static constexpr int kPitch = kWidth * 2 + 16;
  static constexpr int kStageBytes = kTileRows * kPitch;

 public:
  using Element = T;
  static constexpr bool kTensorCores = true;
  static constexpr int kKeys = kWarps * 16 * kSlabs;
  static constexpr int kThreadKeys = 2 * kSlabs;
  static constexpr int kThreadQueries = 8;
  static constexpr int kPart = 4;  // queries that a thread finishes at a time
  static constexpr int kLanesPerKey = 4;
  static constexpr int kMaxTargets = 16;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kKeys <= kStages * kTileRows, "keys and values pass through the stages");

  __device__ static int key(int i) { return warp() * 16 * kSlabs + i * 8 + lane() / 4; }
  __device__ static int query(int i) { return i / 2 * 8 + lane() % 4 * 2 + i % 2; }

  template <typename Source>
  __device__ TensorCoreTiles(unsigned char* shared, const Rows<T>& keys, const Rows<T>& values, RowShape shape,
                             Source& source)
      : shared_(shared), shape_(shape) {
    load_slabs(keys, keys_);
    load_slabs(values, values_);
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) fill(stage, source);
  }

  // Multiplies the block's keys (kValues: values) by the source's next rows. Each part of the product is handed to
  // finish(first query, part) while it is in registers, before the next is begun: there is no room for all of them.
  template <bool kValues, typename Source, typename Finish>
  __device__ void multiply(Source& source, const Finish& finish) {
    ptx::wait<kStages - 2>();
    __syncthreads();
    // Every thread is done with the stage before this one.
    fill((stage_ + kStages - 1) % kStages, source);

    const uint32_t (&left)[kSlabs][kDepth][4] = kValues ? values_ : keys_;
    const int lane = ptx::thread() % 32;
    const unsigned char* tile =
        shared_ + stage_ * kStageBytes + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float product[kThreadKeys][kPart] = {};
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        uint32_t right[4];  // columns 0-7 and 8-15 of eight rows, then of the next eight
        ptx::load_matrices(right, tile + half * 16 * kPitch + k * 32);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) multiply_add_16<T>(product[2 * s], product[2 * s + 1], left[s][k], right);
      }
      finish(half * kPart, product);
    }
    stage_ = (stage_ + 1) % kStages;
  }

 private:
  __device__ void load_slabs(const Rows<T>& rows, uint32_t (&slabs)[kSlabs][kDepth][4]) {
    copy_rows<kKeys, kWidth / 8>(rows, 0, shape_, shared_, kPitch);
    ptx::commit();
    ptx::wait<0>();
    __syncthreads();
    const unsigned char* from = shared_ + (warp() * 16 * kSlabs + lane() % 16) * kPitch + lane() / 16 * 16;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
      for (int k = 0; k < kDepth; ++k) ptx::load_matrices(slabs[s][k], from + s * 16 * kPitch + k * 32);
    }
    __syncthreads();
  }

  template <typename Source>
  __device__ void fill(int stage, Source& source) {
    Rows<T> rows;
    if (source.next(rows)) copy_rows<kTileRows, kWidth / 8>(rows, 0, shape_, shared_ + stage * kStageBytes, kPitch);
    ptx::commit();
  }

  unsigned char* shared_;
  RowShape shape_;
  int stage_ = 0;
  uint32_t keys_[kSlabs][kDepth][4], values_[kSlabs][kDepth][4];
};

// Products in float32 arithmetic of any element on any architecture, of kLeft rows with a tile's. Both pass in slices
// of their width, two at a time, so that every width fits sm_75's shared memory.
template <typename T, int kLeft>
class FmaSlices {
  static constexpr int kSliceBytes = 64;
  static constexpr int kSlice = kSliceBytes / sizeof(T);
  static constexpr int kChunks = kSliceBytes / 16;
  static constexpr int kPitch = kSliceBytes + 16;  // an odd multiple of 16 bytes
  static constexpr int kStageBytes = (kLeft + kTileRows) * kPitch;
  // Blocks of 64 rows have 128 registers' worth of sums beside the product: more than two chunks at once spill.
  static constexpr int kUnrolled = kLeft < 128 ? 2 : kChunks;

 public:
  static constexpr int kThreadLeft = kLeft / 16;
  static constexpr int kThreadRight = 4;
  static constexpr int kLanesPerLeft = 8;
  static constexpr int kSharedBytes = 2 * kStageBytes;

  __device__ static int left(int i) { return warp() * 4 + lane() / 8 + i * 16; }
  __device__ static int right(int i) { return lane() % 8 + i * 8; }

  // Adds to the product. Shared memory may be written again when it returns.
  __device__ static void multiply(unsigned char* shared, const Rows<T>& left, const Rows<T>& right, RowShape shape,
                                  float (&product)[kThreadLeft][kThreadRight]) {
    const auto stage = [&](int column) { return shared + column / kSlice % 2 * kStageBytes; };
    const auto fill = [&](int column) {
      if (column < shape.width) {
        copy_rows<kLeft, kChunks>(left, column, shape, stage(column), kPitch);
        copy_rows<kTileRows, kChunks>(right, column, shape, stage(column) + kLeft * kPitch, kPitch);
      }
      ptx::commit();
    };
    fill(0);
    for (int column = 0; column < shape.width; column += kSlice) {
      fill(column + kSlice);
      ptx::wait<1>();
      __syncthreads();
      add_slice(stage(column), product);
      __syncthreads();
    }
  }

 private:
  struct alignas(16) Chunk {
    T element[16 / sizeof(T)];
  };

  __device__ static void add_slice(const unsigned char* slice, float (&product)[kThreadLeft][kThreadRight]) {
#pragma unroll(kUnrolled)
    for (int c = 0; c < kChunks; ++c) {
      Chunk row[kThreadRight];
#pragma unroll
      for (int q = 0; q < kThreadRight; ++q) {
        row[q] = *reinterpret_cast<const Chunk*>(slice + (kLeft + right(q)) * kPitch + c * 16);
      }
#pragma unroll
      for (int i = 0; i < kThreadLeft; ++i) {
        const Chunk own = *reinterpret_cast<const Chunk*>(slice + left(i) * kPitch + c * 16);
#pragma unroll
        for (int e = 0; e < static_cast<int>(16 / sizeof(T)); ++e) {
#pragma unroll
          for (int q = 0; q < kThreadRight; ++q) {
            product[i][q] = fmaf(to_float(own.element[e]), to_float(row[q].element[e]), product[i][q]);
          }
        }
      }
    }
  }
};

// What TensorCoreTiles does, without tensor cores: what float32 asks for, and the only way for bfloat16 on sm_75.
template <typename T>
class FmaTiles {
  using Slices = FmaSlices<T, 128>;

 public:
  using Element = T;
  static constexpr bool kTensorCores = false;
  static constexpr int kKeys = 128;
  static constexpr int kThreadKeys = Slices::kThreadLeft;
  static constexpr int kThreadQueries = Slices::kThreadRight;
  static constexpr int kPart = 4;
  static constexpr int kLanesPerKey = Slices::kLanesPerLeft;
  static constexpr int kMaxTargets = 4;
  static constexpr int kSharedBytes = Slices::kSharedBytes;

  __device__ static int key(int i) { return Slices::left(i); }
  __device__ static int query(int i) { return Slices::right(i); }

  template <typename Source>
  __device__ FmaTiles(unsigned char* shared, const Rows<T>& keys, const Rows<T>& values, RowShape shape, Source&)
      : shared_(shared), keys_(keys), values_(values), shape_(shape) {}

  template <bool kValues, typename Source, typename Finish>
  __device__ void multiply(Source& source, const Finish& finish) {
    Rows<T> right;
    source.next(right);
    float product[kThreadKeys][kPart] = {};
    Slices::multiply(shared_, kValues ? values_ : keys_, right, shape_, product);
    finish(0, product);
  }

 private:
  unsigned char* shared_;
  Rows<T> keys_, values_;
  RowShape shape_;
};

// What a product multiplies.
template <typename T>
struct Sides {
  Rows<T> left, right;
};

// 16-bit elements on tensor cores, from sm_80, where both sides are others for every product. They pass in slices of
// their width, through a ring of stages which copies fill ahead of time, also over the end of a product: one kernel
// serves every width, and a product's last slices hide the copies of the next one's first.
template <typename T>
class TensorCoreSides {
  static constexpr int kSlabs = 2;
  static constexpr int kSlice = 32;
  // 45 KiB in all: two blocks fit even a multiprocessor of 100 KiB.
  static constexpr int kStages = 3;
  static constexpr int kPitch = kSlice * 2 + 16;  // an odd multiple of 16 bytes

 public:
  using Element = T;
  static constexpr bool kTensorCores = true;
  static constexpr int kLeft = kWarps * 16 * kSlabs;
  static constexpr int kRight = 64;
  static constexpr int kThreadLeft = 2 * kSlabs;
  static constexpr int kThreadRight = kRight / 4;
  static constexpr int kLanesPerLeft = 4;
  static constexpr int kStageBytes = (kLeft + kRight) * kPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  __device__ static int left(int i) { return warp() * 16 * kSlabs + i * 8 + lane() / 4; }
  __device__ static int right(int i) { return i / 2 * 8 + lane() % 4 * 2 + i % 2; }

  template <typename Source>
  __device__ TensorCoreSides(unsigned char* shared, RowShape shape, Source& source) : shared_(shared), shape_(shape) {
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) fill(stage, source);
  }

  // Adds the product of the source's next sides.
  template <typename Source>
  __device__ void multiply(Source& source, float (&product)[kThreadLeft][kThreadRight]) {
#pragma unroll 1
    for (int column = 0; column < shape_.width; column += kSlice) {
      ptx::wait<kStages - 2>();
      __syncthreads();
      // Every thread is done with the stage before this one.
      fill((stage_ + kStages - 1) % kStages, source);
      add_slice(shared_ + stage_ * kStageBytes, product);
      stage_ = (stage_ + 1) % kStages;
    }
  }

 private:
  template <typename Source>
  __device__ void fill(int stage, Source& source) {
    if (source.more()) {
      const Sides<T> sides = source.sides();
      unsigned char* const to = shared_ + stage * kStageBytes;
      copy_rows<kLeft, kSlice / 8>(sides.left, column_, shape_, to, kPitch);
      copy_rows<kRight, kSlice / 8>(sides.right, column_, shape_, to + kLeft * kPitch, kPitch);
      column_ += kSlice;
      if (column_ >= shape_.width) {
        column_ = 0;
        source.advance();
      }
    }
    ptx::commit();
  }

  __device__ static void add_slice(const unsigned char* slice, float (&product)[kThreadLeft][kThreadRight]) {
    const int lane = ptx::thread() % 32;
    const unsigned char* const own = slice + (warp() * 16 * kSlabs + lane % 16) * kPitch + lane / 16 * 16;
    const unsigned char* const rows = slice + (kLeft + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k) {
      uint32_t slab[kSlabs][4];
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) ptx::load_matrices(slab[s], own + s * 16 * kPitch + k * 32);
#pragma unroll
      for (int part = 0; part < kRight / 16; ++part) {
        uint32_t right[4];  // columns 0-7 and 8-15 of eight rows, then of the next eight
        ptx::load_matrices(right, rows + part * 16 * kPitch + k * 32);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
          multiply_add_16<T>(product[2 * s] + part * 4, product[2 * s + 1] + part * 4, slab[s], right);
        }
      }
    }
  }

  unsigned char* shared_;
  RowShape shape_;
  int stage_ = 0;
  int column_ = 0;  // of the slice to be copied next
};

// What TensorCoreSides does, without tensor cores.
template <typename T>
class FmaSides {
  using Slices = FmaSlices<T, 128>;

 public:
  using Element = T;
  static constexpr bool kTensorCores = false;
  static constexpr int kLeft = 128;
  static constexpr int kRight = kTileRows;
  static constexpr int kThreadLeft = Slices::kThreadLeft;
  static constexpr int kThreadRight = Slices::kThreadRight;
  static constexpr int kLanesPerLeft = Slices::kLanesPerLeft;
  static constexpr int kSharedBytes = Slices::kSharedBytes;

  __device__ static int left(int i) { return Slices::left(i); }
  __device__ static int right(int i) { return Slices::right(i); }

  template <typename Source>
  __device__ FmaSides(unsigned char* shared, RowShape shape, Source&) : shared_(shared), shape_(shape) {}

  template <typename Source>
  __device__ void multiply(Source& source, float (&product)[kThreadLeft][kThreadRight]) {
    const Sides<T> sides = source.sides();
    source.advance();
    Slices::multiply(shared_, sides.left, sides.right, shape_, product);
  }

 private:
  unsigned char* shared_;
  RowShape shape_;
};

}  // namespace fastxai::cuda
