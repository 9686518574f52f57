// relevancy_product on the host: its launch, and what is expected of its kernels.
#pragma once

#include "launch_on_host.h"

#include "../../csrc/cuda/relevancy_product.cuh"

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

template <typename T>
void expect_columns() {
  const auto one = [](auto tiles) {
    using Tiles = typename decltype(tiles)::type;
    expect<Tiles>("relevancy_product_columns", shared_bytes<Tiles>(Tiles::kMaxTargets, kMaxListed));
  };
  each_of<FmaTiles<T>>(one);
  if constexpr (!std::is_same_v<T, float>) {
    each_of<TensorCoreTiles<T, 64>, TensorCoreTiles<T, 96>, TensorCoreTiles<T, 128>, TensorCoreTiles<T, 256>>(one);
  }
}

FASTXAI_EXPECT(relevancy_product, expect_columns);
