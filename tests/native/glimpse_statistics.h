// glimpse_statistics on the host: its launch, and what is expected of its kernels.
#pragma once

#include "launch_on_host.h"

#include "../../csrc/cuda/glimpse_statistics.cuh"

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

template <typename T>
void expect_statistics() {
  expect<FmaSides<T>>("glimpse_statistics_rows", statistics_bytes<FmaSides<T>>());
  if constexpr (!std::is_same_v<T, float>) {
    expect<TensorCoreSides<T>>("glimpse_statistics_rows", statistics_bytes<TensorCoreSides<T>>());
  }
}

FASTXAI_EXPECT(glimpse_statistics, expect_statistics);
