// The CUDA kernels compiled for the host. Built and called by test_cuda_on_host.py.

#include "cuda_on_host.h"

#include "../../csrc/cuda/relevancy_product.cuh"

using fastxai::RelevancyProduct;

// sizes: B, N, N or 1, H, Hkv, Sq, Sk, d. strides, in elements: three of query, key, value, four of grad_output.
// Tells how many blocks shared a head's rows.
extern "C" int relevancy_product(int32_t element, const void* query, const void* key, const void* value,
                                 const void* grad_output, const float* logsumexp, const float* row,
                                 const int32_t* key_start, const int32_t* key_end, const int64_t* sizes,
                                 const int64_t* strides, float scale, int32_t multiprocessors, int32_t tensor_cores,
                                 int32_t backwards, float* result) {
  RelevancyProduct p{};
  p.element = static_cast<fastxai::Element>(element);
  p.query = query, p.key = key, p.value = value, p.grad_output = grad_output;
  p.logsumexp = logsumexp, p.row = row, p.key_start = key_start, p.key_end = key_end, p.result = result;
  p.batch = sizes[0], p.targets = sizes[1], p.grad_targets = sizes[2], p.heads = sizes[3], p.key_heads = sizes[4];
  p.queries = sizes[5], p.keys = sizes[6], p.width = sizes[7], p.scale = scale;
  std::memcpy(p.query_stride, strides, sizeof(p.query_stride));
  std::memcpy(p.key_stride, strides + 3, sizeof(p.key_stride));
  std::memcpy(p.value_stride, strides + 6, sizeof(p.value_stride));
  std::memcpy(p.grad_stride, strides + 9, sizeof(p.grad_stride));

  using namespace fastxai::cuda;
  const Device device{multiprocessors, tensor_cores != 0};
  const Plan plan = make_plan(p, device);
  std::vector<TileRange> ranges(static_cast<size_t>(tile_range_count(p, plan)));
  std::vector<float> partial(static_cast<size_t>(partial_count(p, plan)), NAN);
  launch_kernels(p, plan, device, ranges.data(), partial.data(), cuda_on_host::Launch{kThreads, backwards != 0});
  return plan.splits;
}
