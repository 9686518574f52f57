// Runs CUDA kernels on the host, for tests: the same source, compiled by the host's compiler, one fiber per thread and
// one block after the other. What only shows on a device (races, speed) does not show here; what a kernel computes,
// with every fragment of every tensor-core instruction in its place, does.
//
// It is stricter than a device where that is cheap: asynchronous copies happen as late as they may, shared memory holds
// NaN when a block starts, and the order in which threads run between two barriers can be turned round.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_, unsigned z_) : x(x_), y(y_), z(z_) {}
};
static dim3 blockIdx(0, 0, 0), gridDim(0, 0, 0), threadIdx(0, 0, 0);

namespace cuda_on_host {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

constexpr size_t kStackBytes = 256 << 10;

// A copy to shared memory that has been asked for and not waited for.
struct Copy {
  void* shared;
  const void* global;
  int present;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started, finished;
  std::vector<std::vector<Copy>> copies;  // the last group is still open
};

// Threads that wait for each other: the lanes of a warp, or a block.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned generation = 0;
  void* offered[32];  // by the lanes of a warp
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned current = 0;
};
static Block* block = nullptr;
static uint64_t waits = 0;  // for the kernel before, of all threads

// glibc's own setjmp keeps signal masks out of it, which makes a switch cost nanoseconds.
inline void yield() {
  Fiber& fiber = block->fibers[block->current];
  if (_setjmp(fiber.state) == 0) _longjmp(block->scheduler, 1);
}

inline void fiber_main() {
  block->body();
  Fiber& fiber = block->fibers[block->current];
  if (fiber.copies.size() > 1 || !fiber.copies.back().empty()) {
    for (const auto& group : fiber.copies) {
      if (!group.empty()) fail("a thread ended with copies under way");
    }
  }
  fiber.finished = true;
  _longjmp(block->scheduler, 1);
}

// The last to arrive does the work, with everything that the others offered.
template <typename Work>
inline void meet(Meeting& meeting, const Work& work) {
  if (++meeting.arrived == meeting.size) {
    work();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  for (const unsigned generation = meeting.generation; generation == meeting.generation;) yield();
}

template <typename Work>
inline void meet_warp(void* own, const Work& work) {
  Meeting& warp = block->warps[block->current / 32];
  warp.offered[block->current % 32] = own;
  meet(warp, [&] { work(warp.offered); });
}

inline void run_block(unsigned threads, bool backwards, const std::function<void()>& body) {
  Block& b = *block;
  b.body = body;
  b.fibers.resize(threads);
  b.warps.assign(threads / 32, {});
  for (Meeting& warp : b.warps) warp.size = 32;
  b.all = {};
  b.all.size = static_cast<int>(threads);
  for (Fiber& fiber : b.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.started = fiber.finished = false;
    fiber.copies.assign(1, {});
  }
  // Both live across _setjmp, hence volatile.
  for (volatile unsigned left = threads; left > 0;) {
    const unsigned before = left;
    bool moved = false;
    for (volatile unsigned turn = 0; turn < threads; turn = turn + 1) {
      b.current = backwards ? threads - 1 - turn : +turn;
      Fiber& fiber = b.fibers[b.current];
      if (fiber.finished) continue;
      moved = true;
      threadIdx.x = b.current;
      if (_setjmp(b.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.state, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
        setcontext(&fiber.start);
      }
      if (b.fibers[b.current].finished) left = left - 1;
    }
    if (left < before && left > 0 && b.all.arrived > 0) fail("a thread ended while others wait at a barrier");
    if (!moved) fail("no thread can run");
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::meet(cuda_on_host::block->all, [] {});
}

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int step) {
  struct Offer {
    T value, result;
    int step;
  } own{value, value, step};
  cuda_on_host::meet_warp(&own, [](void** offered) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Offer*>(offered[lane]);
      to->result = static_cast<Offer*>(offered[lane ^ to->step])->value;
    }
  });
  return own.result;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned own = vote;
  cuda_on_host::meet_warp(&own, [](void** offered) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= *static_cast<unsigned*>(offered[lane]) << lane;
    for (int lane = 0; lane < 32; ++lane) *static_cast<unsigned*>(offered[lane]) = votes;
  });
  return own;
}

inline float atomicAdd(float* sum, float value) {
  const float before = *sum;
  *sum += value;
  return before;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

#include "../../csrc/cuda/ptx.cuh"

namespace fastxai::cuda {

constexpr int kSharedMemoryBytes = 228 << 10;
alignas(1024) unsigned char shared_memory[kSharedMemoryBytes];

namespace ptx {

int thread() {
  return static_cast<int>(threadIdx.x);
}

void forget(uint32_t&) {}

// Kernels run one after the other here.
void let_next_kernel_begin() {}
void wait_for_kernel_before() {
  ++cuda_on_host::waits;
}

void copy16(void* shared, const void* global, int present) {
  using namespace cuda_on_host;
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("a copy to an address that is no multiple of 16");
  if (present > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a copy from such an address");
  if (present < 0 || present > 16) fail("a copy of less than nothing or more than 16 bytes");
  block->fibers[block->current].copies.back().push_back({shared, global, present});
}

void commit() {
  using namespace cuda_on_host;
  block->fibers[block->current].copies.emplace_back();
}

template <int kPending>
void wait() {
  using namespace cuda_on_host;
  auto& copies = block->fibers[block->current].copies;
  while (copies.size() > kPending + 1) {
    for (const Copy& copy : copies.front()) {
      std::memset(copy.shared, 0, 16);
      if (copy.present > 0) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.present));
    }
    copies.erase(copies.begin());
  }
}

template <bool kTransposed>
void load_any_matrices(uint32_t (&matrix)[4], const void* shared) {
  struct Offer {
    uint32_t* matrix;
    const unsigned char* row;
  } own{matrix, static_cast<const unsigned char*>(shared)};
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) cuda_on_host::fail("a matrix row at no multiple of 16 bytes");
  cuda_on_host::meet_warp(&own, [](void** offered) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        auto* to = reinterpret_cast<uint16_t*>(&static_cast<Offer*>(offered[lane])->matrix[m]);
        for (int e = 0; e < 2; ++e) {
          const int along = lane % 4 * 2 + e, across = lane / 4;
          const int row = kTransposed ? along : across, column = kTransposed ? across : along;
          std::memcpy(to + e, static_cast<Offer*>(offered[m * 8 + row])->row + column * 2, 2);
        }
      }
    }
  });
}

void load_matrices(uint32_t (&matrix)[4], const void* shared) {
  load_any_matrices<false>(matrix, shared);
}
void load_matrices_transposed(uint32_t (&matrix)[4], const void* shared) {
  load_any_matrices<true>(matrix, shared);
}

float widened(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  float value;
  std::memcpy(&value, &magnitude, sizeof(value));
  // The product restores the exponent's bias and normalises subnormals.
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits |= special | sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = fabsf(value);
  if (!(magnitude < 65520.0f)) return sign | (magnitude != magnitude ? 0x7fffu : 0x7c00u);
  // float32's own rounding, to nearest even: added to a power of two, everything below float16's last place falls away.
  int exponent;
  std::frexp(magnitude, &exponent);
  const float unit = std::ldexp(1.0f, (exponent < -13 ? -13 : exponent) - 11);
  const float rounded = (magnitude + unit * 0x1p23f) - unit * 0x1p23f;
  if (rounded == 0.0f) return sign;
  // float16 as its bits, which count its values: subnormals, then 1024 for every exponent.
  std::frexp(rounded, &exponent);
  const int step = exponent < -13 ? -13 : exponent;
  return sign | static_cast<uint16_t>(std::ldexp(rounded, 11 - step) + static_cast<float>((step + 13) * 1024));
}

inline float to_float(BFloat16, uint16_t bits) {
  const uint32_t shifted = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &shifted, sizeof(value));
  return value;
}
inline float to_float(Float16, uint16_t bits) {
  return widened(bits);
}

template <typename T>
void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Offer {
    float* c[4];
    const uint32_t* a;
    uint32_t b[2];
  } own{{&c0, &c1, &c2, &c3}, a, {b0, b1}};
  cuda_on_host::meet_warp(&own, [](void** offered) {
    float left[16][16], right[16][8], sum[16][8] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const auto& from = *static_cast<Offer*>(offered[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) {
          left[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = to_float(T{}, static_cast<uint16_t>(from.a[i] >> (16 * e)));
        }
        for (int i = 0; i < 2; ++i)
          right[2 * t + i * 8 + e][g] = to_float(T{}, static_cast<uint16_t>(from.b[i] >> (16 * e)));
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& to = *static_cast<Offer*>(offered[lane]);
      for (int i = 0; i < 4; ++i) *to.c[i] += sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  });
}

}  // namespace ptx

// Defined in tiles.cuh.
template <typename T>
T narrowed(float value);

namespace ptx {

template <typename T>
uint32_t packed(float first, float second) {
  return fastxai::cuda::narrowed<T>(first).bits | static_cast<uint32_t>(fastxai::cuda::narrowed<T>(second).bits) << 16;
}

float exp2(float x) {
  return ::exp2f(x);
}
float rectified(float x) {
  return x < 0.0f ? 0.0f : x;
}

}  // namespace ptx
}  // namespace fastxai::cuda

namespace cuda_on_host {

// What a kernel launcher is on a device.
struct Launch {
  unsigned threads;
  bool backwards;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, const Arguments&... arguments) const {
    if (shared_bytes > fastxai::cuda::kSharedMemoryBytes) fail("more shared memory than there is");
    Block state;
    block = &state;
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          // NaN in float32, bfloat16 and float16. Also past the end, where a kernel that reads it is caught by it.
          std::memset(fastxai::cuda::shared_memory, 0xff, sizeof(fastxai::cuda::shared_memory));
          run_block(threads, backwards, [&] { kernel(arguments...); });
          for (size_t i = static_cast<size_t>(shared_bytes); i < sizeof(fastxai::cuda::shared_memory); ++i) {
            if (fastxai::cuda::shared_memory[i] != 0xff) fail("a write past the end of shared memory");
          }
        }
      }
    }
    block = nullptr;
  }

  template <typename... Parameters, typename... Arguments>
  void overlapping(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, const Arguments&... arguments) const {
    const uint64_t before = waits;
    (*this)(kernel, grid, shared_bytes, arguments...);
    if (waits - before != uint64_t{threads} * grid.x * grid.y * grid.z)
      fail("a thread did not wait for the kernel before");
  }
};

}  // namespace cuda_on_host
