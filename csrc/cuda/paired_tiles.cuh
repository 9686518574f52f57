// Attention's backward for a block of rows (left) that stays, while the other side's rows (right) stream past in pairs
// of tiles. With L₁, L₂ the left side's two matrices and R₁, R₂ the right side's, a step computes scores = L₁·R₁ᵀ and
// gradients = L₂·R₂ᵀ, lets the kernel turn them into dS and P, and adds dS·R₁ (and P·R₂) to the block's sums. Keys on
// the left give two sums, dK and dV; queries on the left one, dQ.
#pragma once

#include "tiles.cuh"

namespace fastxai::cuda {

// What is known of a row of queries, of one head and target.
struct alignas(16) RowState {
  float shift;         // −logsumexp / log 2
  float delta;         // dO·O
  float weight;        // of the row in the product
  int32_t start, end;  // the keys it sees, among those that there are
  int32_t unused[3];
};

// A step's rows on the right, and of query rows their states.
template <typename T>
struct Pair {
  Rows<T> first, second;
  const RowState* states;
};

// Has the block copy states. Rows past the last see nothing.
template <int kRows>
__device__ inline void copy_states(const RowState* states, int count, RowState* shared) {
  constexpr int kChunks = static_cast<int>(sizeof(RowState) / 16);
  const int thread = ptx::thread(), row = thread / kChunks, chunk = thread % kChunks;
  static_assert(kRows * kChunks <= kThreads);
  if (row >= kRows) return;
  ptx::copy16(reinterpret_cast<unsigned char*>(shared + row) + chunk * 16,
              reinterpret_cast<const unsigned char*>(states + (row < count ? row : 0)) + chunk * 16,
              row < count ? 16 : 0);
}

// 16-bit elements on tensor cores, from sm_80. A warp computes scores of 16·kSlabs left rows, and the sums of one of
// kParts parts of their width. dS and P go from one product to the next without leaving the registers, rounded to the
// elements' type as the tensor cores want them.
template <typename T, int kWidth, int kSums>
class TensorCorePairs {
  // The sums then take at most 128 of a thread's 255 registers.
  static constexpr int kSlabs = kWidth <= 64 ? 2 : 1;
  static constexpr int kParts = kWidth * kSums > 256 ? 2 : 1;
  static constexpr int kColumns = kWidth / kParts;
  // Steps of a product over the width that are scheduled together. All of them spill registers in the widest.
  static constexpr int kUnrolled = kSlabs == 2 ? 2 : 4;
  // An odd multiple of 16 bytes: eight rows of a matrix then lie in different banks.
  static constexpr int kPitch = kWidth * 2 + 16;

 public:
  using Element = T;
  static constexpr bool kTensorCores = true;
  static constexpr int kLeft = kWarps / kParts * 16 * kSlabs;
  static constexpr int kRight = kWidth <= 128 ? 32 : 16;
  static constexpr int kThreadLeft = 2 * kSlabs;
  static constexpr int kThreadRight = kRight / 4;
  static constexpr int kLanesPerLeft = 4;
  static constexpr int kTileBytes = kRight * kPitch;
  static constexpr int kStateBytes = kSums == 2 ? kRight * static_cast<int>(sizeof(RowState)) : 0;
  static constexpr int kPairBytes = 2 * kTileBytes + kStateBytes;
  // The left side, and two pairs of tiles: one is filled while the other is used.
  static constexpr int kSharedBytes = 2 * kLeft * kPitch + 2 * kPairBytes;
  static_assert(kTileRows % kRight == 0);

  __device__ static int left(int i) { return warp() / kParts * 16 * kSlabs + i * 8 + lane() / 4; }
  __device__ static int right(int i) { return i / 2 * 8 + lane() % 4 * 2 + i % 2; }
  // Whether this thread is the first of those that hold entries of the same left rows.
  __device__ static bool first_of_left() { return lane() % kLanesPerLeft == 0 && warp() % kParts == 0; }
  // How many blocks share the width of the sums.
  __device__ __host__ static int chunks(int) { return 1; }

  __device__ TensorCorePairs(unsigned char* shared, const Rows<T>& first, const Rows<T>& second, RowShape shape, int)
      : shared_(shared), shape_(shape) {
    copy_rows<kLeft, kWidth / 8>(first, 0, shape, shared, kPitch);
    copy_rows<kLeft, kWidth / 8>(second, 0, shape, shared + kLeft * kPitch, kPitch);
    ptx::commit();
  }

  // Before the first step with a source, after the last with the one before.
  template <typename Source>
  __device__ void start(Source& source) {
    fill(source);
  }

  // Takes the source's next pair of tiles. finish(score, gradient, states) replaces scores by P and gradients by dS.
  template <typename Source, typename Finish>
  __device__ void step(Source& source, const Finish& finish) {
    ptx::wait<0>();
    __syncthreads();
    const unsigned char* const tile = pair();
    pair_ ^= 1;
    // Every thread is done with the pair before this one.
    fill(source);

    float score[kThreadLeft][kThreadRight] = {}, gradient[kThreadLeft][kThreadRight] = {};
    multiply(shared_, tile, score);
    multiply(shared_ + kLeft * kPitch, tile + kTileBytes, gradient);
    finish(score, gradient, reinterpret_cast<const RowState*>(tile + 2 * kTileBytes));
    add(gradient, tile, sums_[0]);
    if constexpr (kSums == 2) add(score, tile + kTileBytes, sums_[1]);
  }

  // Writes one of the sums to contiguous rows, of which there are `count`.
  template <int kSum>
  __device__ void store(T* rows, int count, float factor) {
    // Nothing may be under way when a block ends, and nothing has been waited for if there was no step.
    ptx::wait<0>();
#pragma unroll
    for (int a = 0; a < kThreadLeft; ++a) {
      T* const row = rows + static_cast<int64_t>(left(a)) * shape_.width;
#pragma unroll
      for (int c = 0; c < kColumns / 8; ++c) {
        const int column = warp() % kParts * kColumns + c * 8 + lane() % 4 * 2;
        const float (&sum)[4] = sums_[kSum][a / 2][c];
        const uint32_t both = ptx::packed<T>(sum[a % 2 * 2] * factor, sum[a % 2 * 2 + 1] * factor);
        if (left(a) >= count || column >= shape_.width) continue;
        if (shape_.width % 2 == 0) {
          *reinterpret_cast<uint32_t*>(row + column) = both;
        } else {
          row[column].bits = static_cast<uint16_t>(both);
          if (column + 1 < shape_.width) row[column + 1].bits = static_cast<uint16_t>(both >> 16);
        }
      }
    }
  }

 private:
  __device__ unsigned char* pair() const { return shared_ + 2 * kLeft * kPitch + pair_ * kPairBytes; }

  template <typename Source>
  __device__ void fill(Source& source) {
    Pair<T> next;
    if (source.next(next)) {
      copy_rows<kRight, kWidth / 8>(next.first, 0, shape_, pair(), kPitch);
      copy_rows<kRight, kWidth / 8>(next.second, 0, shape_, pair() + kTileBytes, kPitch);
      if constexpr (kSums == 2) {
        copy_states<kRight>(next.states, next.first.count, reinterpret_cast<RowState*>(pair() + 2 * kTileBytes));
      }
    }
    ptx::commit();
  }

  __device__ static void multiply(const unsigned char* left_side, const unsigned char* tile,
                                  float (&product)[kThreadLeft][kThreadRight]) {
    const int lane = ptx::thread() % 32;
    const unsigned char* const own = left_side + (warp() / kParts * 16 * kSlabs + lane % 16) * kPitch + lane / 16 * 16;
    const unsigned char* const rows = tile + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll(kUnrolled)
    for (int k = 0; k < kWidth / 16; ++k) {
      uint32_t slab[kSlabs][4];
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) ptx::load_matrices(slab[s], own + s * 16 * kPitch + k * 32);
#pragma unroll
      for (int half = 0; half < kRight / 16; ++half) {
        uint32_t right[4];  // columns 0-7 and 8-15 of eight rows, then of the next eight
        ptx::load_matrices(right, rows + half * 16 * kPitch + k * 32);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
          multiply_add_16<T>(product[2 * s] + half * 4, product[2 * s + 1] + half * 4, slab[s], right);
        }
      }
    }
  }

  // sum += factor · tile. What a thread holds of a product, two adjacent columns of rows g and g + 8, is what it has to
  // hold of the left operand of the next.
  __device__ static void add(const float (&factor)[kThreadLeft][kThreadRight], const unsigned char* tile,
                             float (&sum)[kSlabs][kColumns / 8][4]) {
    const int lane = ptx::thread() % 32;
    const unsigned char* const rows = tile + lane % 16 * kPitch + lane / 16 * 16 + warp() % kParts * kColumns * 2;
#pragma unroll
    for (int half = 0; half < kRight / 16; ++half) {
      uint32_t slab[kSlabs][4];
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const two = factor[2 * s + i % 2] + half * 4 + i / 2 * 2;
          slab[s][i] = ptx::packed<T>(two[0], two[1]);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns / 16; ++c) {
        uint32_t right[4];  // rows 0-7 and 8-15 of eight columns, then of the next eight
        ptx::load_matrices_transposed(right, rows + half * 16 * kPitch + c * 32);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float (&to)[4] = sum[s][2 * c + n];
            ptx::multiply_add<T>(to[0], to[1], to[2], to[3], slab[s], right[2 * n], right[2 * n + 1]);
          }
        }
      }
    }
  }

  unsigned char* shared_;
  RowShape shape_;
  int pair_ = 0;
  float sums_[kSums][kSlabs][kColumns / 8][4] = {};
};

// Any element of any width on any architecture, in float32 arithmetic. A block adds up kColumns columns of the sums;
// blocks that share a wider one compute the scores each for themselves.
template <typename T, int kSums>
class FmaPairs {
  using Slices = FmaSlices<T, 64>;
  static constexpr int kColumns = 128;
  static constexpr int kPanel = 64;  // columns of the right side that are in shared memory at a time
  static constexpr int kPanels = kColumns / kPanel;
  static constexpr int kPanelPitch = kPanel * sizeof(T) + 16;
  static constexpr int kPanelBytes = kTileRows * kPanelPitch;
  static constexpr int kFactorPitch = 64 + 4;  // eight right rows by four left ones then lie in different banks
  static constexpr int kFactorBytes = kTileRows * kFactorPitch * static_cast<int>(sizeof(float));
  static constexpr int kSlots = kSums * kPanelBytes > Slices::kSharedBytes ? kSums * kPanelBytes : Slices::kSharedBytes;

 public:
  using Element = T;
  static constexpr bool kTensorCores = false;
  static constexpr int kLeft = 64;
  static constexpr int kRight = kTileRows;
  static constexpr int kThreadLeft = Slices::kThreadLeft;
  static constexpr int kThreadRight = Slices::kThreadRight;
  static constexpr int kLanesPerLeft = Slices::kLanesPerLeft;
  static constexpr int kStateBytes = kSums == 2 ? kRight * static_cast<int>(sizeof(RowState)) : 0;
  static constexpr int kSharedBytes = kSlots + kSums * kFactorBytes + kStateBytes;

  __device__ static int left(int i) { return Slices::left(i); }
  __device__ static int right(int i) { return Slices::right(i); }
  __device__ static bool first_of_left() { return lane() % kLanesPerLeft == 0; }
  __device__ __host__ static int chunks(int width) { return width > kColumns ? (width + kColumns - 1) / kColumns : 1; }

  __device__ FmaPairs(unsigned char* shared, const Rows<T>& first, const Rows<T>& second, RowShape shape, int chunk)
      : shared_(shared), first_(first), second_(second), shape_(shape), first_column_(chunk * kColumns) {}

  template <typename Source>
  __device__ void start(Source&) {}

  template <typename Source, typename Finish>
  __device__ void step(Source& source, const Finish& finish) {
    Pair<T> next;
    if (!source.next(next)) return;
    auto* const states = reinterpret_cast<RowState*>(shared_ + kSlots + kSums * kFactorBytes);
    if constexpr (kSums == 2) {
      copy_states<kRight>(next.states, next.first.count, states);
      ptx::commit();
    }
    {
      float score[kThreadLeft][kThreadRight] = {}, gradient[kThreadLeft][kThreadRight] = {};
      Slices::multiply(shared_, first_, next.first, shape_, score);
      Slices::multiply(shared_, second_, next.second, shape_, gradient);
      finish(score, gradient, states);
      keep(gradient, 0);
      if constexpr (kSums == 2) keep(score, 1);
    }
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const int column = first_column_ + p * kPanel;
      if (column >= shape_.width) continue;
      copy_rows<kTileRows, kPanelPitch / 16 - 1>(next.first, column, shape_, shared_, kPanelPitch);
      if constexpr (kSums == 2) {
        copy_rows<kTileRows, kPanelPitch / 16 - 1>(next.second, column, shape_, shared_ + kPanelBytes, kPanelPitch);
      }
      ptx::commit();
      ptx::wait<0>();
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kSums; ++s) add(s, sums_[s][p]);
      __syncthreads();
    }
  }

  template <int kSum>
  __device__ void store(T* rows, int count, float factor) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = first_row() + a, column = first_column_ + p * kPanel + first_panel_column() + c;
          if (row < count && column < shape_.width) {
            rows[static_cast<int64_t>(row) * shape_.width + column] = narrowed<T>(sums_[kSum][p][a][c] * factor);
          }
        }
      }
    }
  }

 private:
  static constexpr int kRows = 8;  // of the sums; a thread has four adjacent columns of every panel
  struct alignas(4 * sizeof(T)) Four {
    T element[4];
  };
  struct alignas(16) Factors {
    float row[4];
  };

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / (kPanel / 4) * kRows; }
  __device__ static int first_panel_column() { return static_cast<int>(threadIdx.x) % (kPanel / 4) * 4; }

  __device__ float* factors(int s) const { return reinterpret_cast<float*>(shared_ + kSlots + s * kFactorBytes); }

  // Where all threads find it, by right row.
  __device__ void keep(const float (&factor)[kThreadLeft][kThreadRight], int s) {
#pragma unroll
    for (int q = 0; q < kThreadRight; ++q) {
#pragma unroll
      for (int a = 0; a < kThreadLeft; ++a) factors(s)[right(q) * kFactorPitch + left(a)] = factor[a][q];
    }
  }

  __device__ void add(int s, float (&sum)[kRows][4]) {
    const float* factor = factors(s) + first_row();
    const unsigned char* row = shared_ + s * kPanelBytes + first_panel_column() * static_cast<int>(sizeof(T));
#pragma unroll 2
    for (int q = 0; q < kTileRows; ++q) {
      const Four four = *reinterpret_cast<const Four*>(row + q * kPanelPitch);
      float column[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) column[c] = to_float(four.element[c]);
#pragma unroll
      for (int half = 0; half < kRows / 4; ++half) {
        const Factors own = *reinterpret_cast<const Factors*>(factor + q * kFactorPitch + half * 4);
#pragma unroll
        for (int a = 0; a < 4; ++a) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[half * 4 + a][c] = fmaf(own.row[a], column[c], sum[half * 4 + a][c]);
        }
      }
    }
  }

  unsigned char* shared_;
  Rows<T> first_, second_;
  RowShape shape_;
  int first_column_;
  float sums_[kSums][kPanels][kRows][4] = {};
};

}  // namespace fastxai::cuda
