// The machine's own instructions that the kernels use, one function each. Kernels call nothing else that the CUDA
// language does not have, so a test that defines these functions differently runs the same kernels on the host.
#pragma once

#include <cstdint>

namespace fastxai::cuda {

// 16-bit elements as they are in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fastxai::cuda

namespace fastxai::cuda::ptx {

#if defined(__CUDACC__)

// bfloat16 products, 16-deep tiles and asynchronous copies came with sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// threadIdx.x, read anew at every call: what is computed from it is then not kept in registers over a whole loop.
__device__ inline int thread() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Leaves the word as it is. What was computed from it before is computed anew, and not kept in registers until here.
__device__ inline void forget(uint32_t& word) {
  asm volatile("" : "+r"(word));
}

// Lets a kernel that is launched as overlapping this one begin once every block of this one has called this or ended.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel that this one overlaps has ended and what it wrote can be read.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16 bytes to shared memory, of which the first `present` are read from device memory and the others are zero. Both
// addresses are multiples of 16. The copy is complete after wait() and a barrier.
__device__ inline void copy16(void* shared, const void* global, int present) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(present)
               : "memory");
#else
  auto* target = static_cast<uint4*>(shared);
  if (present == 16) {
    *target = *static_cast<const uint4*>(global);
  } else {
    *target = uint4{0, 0, 0, 0};
    for (int i = 0; i < present / 2; ++i) {
      reinterpret_cast<uint16_t*>(target)[i] = static_cast<const uint16_t*>(global)[i];
    }
  }
#endif
}

// Closes a group of copies.
__device__ inline void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending last groups of this thread's copies are under way.
template <int kPending>
__device__ inline void wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8×8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and gets of every matrix
// the elements 2·(l % 4) and the next of row l / 4.
__device__ inline void load_matrices(uint32_t (&matrix)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same four matrices transposed: the lane gets the elements 2·(l % 4) and the next of column l / 4.
__device__ inline void load_matrices_transposed(uint32_t (&matrix)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(shared))
               : "memory");
}

// c (16×8) += a (16×16) · b (16×8), accumulated in float32. Lane l, with g = l / 4 and t = l % 4, holds
// a: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 and the next; b: rows 2t and 2t+8 and the next of column g;
// c: columns 2t and 2t+1 of row g, then of row g+8.
template <typename T>
__device__ inline void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);

#if __CUDA_ARCH__ >= 800
#define FASTXAI_MMA(type)                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define FASTXAI_MMA(type) __trap()
#endif
template <>
__device__ inline void multiply_add<BFloat16>(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                                              uint32_t b0, uint32_t b1) {
  FASTXAI_MMA("bf16");
}
template <>
__device__ inline void multiply_add<Float16>(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
  FASTXAI_MMA("f16");
}
#undef FASTXAI_MMA

// Two elements as they lie in memory, the first in the lower half, rounded to nearest even.
template <typename T>
__device__ inline uint32_t packed(float first, float second);

#if __CUDA_ARCH__ >= 800
#define FASTXAI_PACK(type) asm("cvt.rn." type "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first))
#else
#define FASTXAI_PACK(type) __trap()
#endif
template <>
__device__ inline uint32_t packed<BFloat16>(float first, float second) {
  uint32_t pair = 0;
  FASTXAI_PACK("bf16");
  return pair;
}
template <>
__device__ inline uint32_t packed<Float16>(float first, float second) {
  uint32_t pair = 0;
  FASTXAI_PACK("f16");
  return pair;
}
#undef FASTXAI_PACK

// The float16 element as it is in memory.
__device__ inline float widened(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// Its inverse, rounded to nearest even.
__device__ inline uint16_t narrowed(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

// 2^x within 2 ulp, zero where that is subnormal.
__device__ inline float exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// max(x, 0), and NaN for NaN, as torch.clamp gives it.
__device__ inline float rectified(float x) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

#else  // Defined by whoever compiles the kernels for the host: tests/native/cuda_on_host.h.

constexpr bool kTensorCores = true;
int thread();
void forget(uint32_t& word);
void let_next_kernel_begin();
void wait_for_kernel_before();
void copy16(void* shared, const void* global, int present);
void commit();
template <int kPending>
void wait();
void load_matrices(uint32_t (&matrix)[4], const void* shared);
void load_matrices_transposed(uint32_t (&matrix)[4], const void* shared);
template <typename T>
void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <typename T>
uint32_t packed(float first, float second);
float widened(uint16_t half);
uint16_t narrowed(float value);
float exp2(float x);
float rectified(float x);

#endif

}  // namespace fastxai::cuda::ptx
