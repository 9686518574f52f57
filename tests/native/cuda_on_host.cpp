// The CUDA kernels compiled for the host. Built and called by test_cuda_on_host.py.

#include "cuda_on_host.h"

#include "../../csrc/cuda/attention_backward_relevancy.cuh"
#include "../../csrc/cuda/glimpse_statistics.cuh"
#include "../../csrc/cuda/proxy_relevancy.cuh"
#include "../../csrc/cuda/relevancy_product.cuh"

using namespace fastxai::cuda;

namespace {

// What every operator's problem has under the same names. Strides, in elements: three of each tensor, four of
// grad_output, which comes last.
template <typename Problem>
void fill(Problem& p, int32_t element, const void* const* tensors, const int64_t* sizes, const int64_t* strides,
          float scale) {
  p.element = static_cast<fastxai::Element>(element), p.scale = scale;
  p.query = tensors[0], p.key = tensors[1], p.value = tensors[2], p.grad_output = tensors[3];
  p.logsumexp = static_cast<const float*>(tensors[4]);
  p.key_start = static_cast<const int32_t*>(tensors[6]), p.key_end = static_cast<const int32_t*>(tensors[7]);
  p.batch = sizes[0], p.targets = sizes[1], p.heads = sizes[2], p.key_heads = sizes[3];
  p.queries = sizes[4], p.keys = sizes[5], p.width = sizes[6];
  std::memcpy(p.query_stride, strides, sizeof(p.query_stride));
  std::memcpy(p.key_stride, strides + 3, sizeof(p.key_stride));
  std::memcpy(p.value_stride, strides + 6, sizeof(p.value_stride));
  std::memcpy(p.grad_stride, strides + 9, sizeof(p.grad_stride));
}

}  // namespace

// As test_cuda_on_host.py has it.
struct Options {
  int32_t multiprocessors, tensor_cores, backwards, atomics;

  Device device() const { return {multiprocessors, tensor_cores != 0}; }
  cuda_on_host::Launch launch() const { return {kThreads, backwards != 0}; }
};

// tensors: query, key, value, grad_output, logsumexp, row, key_start, key_end. sizes: B, N, H, Hkv, Sq, Sk, d, and the
// gradients, N or 1. Tells how many blocks shared a head's rows.
extern "C" int relevancy_product(int32_t element, const void* const* tensors, const int64_t* sizes,
                                 const int64_t* strides, float scale, const Options* options, void* const* results) {
  fastxai::RelevancyProduct p{};
  fill(p, element, tensors, sizes, strides, scale);
  p.row = static_cast<const float*>(tensors[5]), p.grad_targets = sizes[7], p.result = static_cast<float*>(results[0]);

  const Plan plan = make_plan(p, options->device(), options->atomics != 0);
  std::vector<TileRange> ranges(static_cast<size_t>(tile_range_count(p, plan)));
  std::vector<float> partial(static_cast<size_t>(partial_count(p, plan)), NAN);
  launch_kernels(p, plan, options->device(), ranges.data(), partial.data(), options->launch());
  return plan.splits;
}

// tensors, then output; strides, then three of output. results: grad_query, grad_key, grad_value, product.
extern "C" void attention_backward_relevancy(int32_t element, const void* const* tensors, const int64_t* sizes,
                                             const int64_t* strides, float scale, const Options* options,
                                             void* const* results) {
  fastxai::AttentionBackwardRelevancy p{};
  fill(p, element, tensors, sizes, strides, scale);
  p.row = static_cast<const float*>(tensors[5]), p.output = tensors[8];
  std::memcpy(p.output_stride, strides + 13, sizeof(p.output_stride));
  p.grad_query = results[0], p.grad_key = results[1], p.grad_value = results[2];
  p.product = static_cast<float*>(results[3]);

  const BackwardPlan plan = make_plan(p);
  std::vector<TileRange> ranges(static_cast<size_t>(tile_range_count(p, plan)));
  std::vector<RowState> states(static_cast<size_t>(state_count(p)));
  std::memset(static_cast<void*>(states.data()), 0xff, states.size() * sizeof(RowState));
  std::vector<float> partial(static_cast<size_t>(partial_count(p)), NAN);
  launch_kernels(p, plan, options->device(), ranges.data(), states.data(), partial.data(), options->launch());
}

// tensors, then sum_start and sum_end. results: row_sums, gradient_sums, norm.
extern "C" void glimpse_statistics(int32_t element, const void* const* tensors, const int64_t* sizes,
                                   const int64_t* strides, float scale, const Options* options, void* const* results) {
  fastxai::GlimpseStatistics p{};
  fill(p, element, tensors, sizes, strides, scale);
  p.sum_start = static_cast<const int32_t*>(tensors[8]), p.sum_end = static_cast<const int32_t*>(tensors[9]);
  p.row_sums = static_cast<float*>(results[0]), p.gradient_sums = static_cast<float*>(results[1]);
  p.norm = static_cast<float*>(results[2]);

  const StatisticsPlan plan = make_plan(p, options->device());
  std::vector<TileRange> ranges(static_cast<size_t>(tile_range_count(p, plan)));
  std::vector<RowSums> sums(static_cast<size_t>(sum_count(p, plan)), RowSums{NAN, NAN});
  std::vector<float> norms(static_cast<size_t>(norm_count(p, plan)), NAN);
  launch_kernels(p, plan, options->device(), ranges.data(), sums.data(), norms.data(), options->launch());
}

// tensors: hidden, query, offset, lengths. sizes: B, S, N, D. strides: two of hidden, in elements. results: map,
// entropy, bernoulli.
extern "C" void proxy_relevancy(int32_t element, const void* const* tensors, const int64_t* sizes,
                                const int64_t* strides, float eps, int32_t centered, int32_t softmax, int32_t backwards,
                                void* const* results) {
  fastxai::ProxyRelevancy p{};
  p.element = static_cast<fastxai::Element>(element), p.hidden = tensors[0];
  p.query = static_cast<const float*>(tensors[1]), p.offset = static_cast<const float*>(tensors[2]);
  p.lengths = static_cast<const int32_t*>(tensors[3]);
  p.map = static_cast<float*>(results[0]), p.entropy = static_cast<float*>(results[1]);
  p.bernoulli = static_cast<float*>(results[2]);
  p.batch = sizes[0], p.columns = sizes[1], p.targets = sizes[2], p.width = sizes[3];
  std::memcpy(p.hidden_stride, strides, sizeof(p.hidden_stride));
  p.eps = eps, p.centered = centered != 0, p.softmax = softmax != 0;
  launch_kernels(p, cuda_on_host::Launch{kThreads, backwards != 0});
}
