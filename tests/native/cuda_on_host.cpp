// The CUDA kernels compiled for the host: every thread of every block runs in a loop. Built by test_build.py.

#include <math.h>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__

struct Index {
  unsigned x, y, z;
};
static Index blockIdx, threadIdx;

#include "../../csrc/cuda/relevancy_product.cuh"

using fastxai::Element;
using fastxai::RelevancyProduct;

template <typename Kernel>
static void launch(Kernel kernel, unsigned x, unsigned y, unsigned z, const RelevancyProduct& problem, float* partial) {
  for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
        for (threadIdx.x = 0; threadIdx.x < fastxai::cuda::kThreads; ++threadIdx.x) kernel(problem, partial);
      }
    }
  }
}

static unsigned blocks(int64_t count) {
  return static_cast<unsigned>((count + fastxai::cuda::kThreads - 1) / fastxai::cuda::kThreads);
}

// All tensors contiguous. sizes: B, N, N or 1, H, Hkv, Sq, Sk, d. partial: zeros, (B, H, N, Sk).
extern "C" void relevancy_product(int32_t element, const void* query, const void* key, const void* value,
                                  const void* grad_output, const float* logsumexp, const float* row,
                                  const int32_t* key_start, const int32_t* key_end, const int64_t* sizes, float scale,
                                  float* partial, float* result) {
  RelevancyProduct p{};
  p.element = static_cast<Element>(element);
  p.query = query, p.key = key, p.value = value, p.grad_output = grad_output;
  p.logsumexp = logsumexp, p.row = row, p.key_start = key_start, p.key_end = key_end, p.result = result;
  p.batch = sizes[0], p.targets = sizes[1], p.grad_targets = sizes[2], p.heads = sizes[3], p.key_heads = sizes[4];
  p.queries = sizes[5], p.keys = sizes[6], p.width = sizes[7], p.scale = scale;
  const int64_t query_strides[] = {p.heads * p.queries * p.width, p.queries * p.width, p.width};
  const int64_t key_strides[] = {p.key_heads * p.keys * p.width, p.keys * p.width, p.width};
  std::memcpy(p.query_stride, query_strides, sizeof(query_strides));
  std::memcpy(p.key_stride, key_strides, sizeof(key_strides));
  std::memcpy(p.value_stride, key_strides, sizeof(key_strides));
  const int64_t grad_strides[] = {p.grad_targets * query_strides[0], query_strides[0], query_strides[1], p.width};
  std::memcpy(p.grad_stride, grad_strides, sizeof(grad_strides));

  using namespace fastxai::cuda;
  const unsigned x = blocks(p.keys), y = static_cast<unsigned>(p.heads), z = static_cast<unsigned>(p.batch);
  switch (p.element) {
    case Element::kFloat32:
      launch(relevancy_product_columns<float>, x, y, z, p, partial);
      break;
    case Element::kBFloat16:
      launch(relevancy_product_columns<fastxai::cuda::BFloat16>, x, y, z, p, partial);
      break;
    case Element::kFloat16:
      launch(relevancy_product_columns<fastxai::cuda::Float16>, x, y, z, p, partial);
      break;
  }
  launch(average_heads, blocks(p.targets * p.keys), z, 1, p, partial);
}
