// attention_backward_relevancy on the host: its launch, and what is expected of its kernels.
#pragma once

#include "launch_on_host.h"

#include "../../csrc/cuda/attention_backward_relevancy.cuh"

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

template <typename T>
void expect_backward() {
  const auto keys = [](auto pairs) {
    using Pairs = typename decltype(pairs)::type;
    expect<Pairs>("backward_keys", backward_keys_bytes<Pairs>(kMaxListed));
  };
  const auto rows = [](auto pairs) {
    using Pairs = typename decltype(pairs)::type;
    expect<Pairs>("backward_rows", Pairs::kSharedBytes);
  };
  each_of<FmaPairs<T, 2>>(keys);
  each_of<FmaPairs<T, 1>>(rows);
  if constexpr (!std::is_same_v<T, float>) {
    each_of<TensorCorePairs<T, 64, 2>, TensorCorePairs<T, 96, 2>, TensorCorePairs<T, 128, 2>,
            TensorCorePairs<T, 256, 2>>(keys);
    each_of<TensorCorePairs<T, 64, 1>, TensorCorePairs<T, 96, 1>, TensorCorePairs<T, 128, 1>,
            TensorCorePairs<T, 256, 1>>(rows);
  }
}

FASTXAI_EXPECT(attention_backward_relevancy, expect_backward);
