// proxy_relevancy on the host: its launch, and what is expected of its kernels.
#pragma once

#include "launch_on_host.h"

#include "../../csrc/cuda/proxy_relevancy.cuh"

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

// States that start at 16 bytes are streamed: four loads of each of four columns.
template <typename T>
void expect_scores() {
  expect<WideStates<T, 1>>("proxy_relevancy_scores", sizeof(ProxySums), false, 16);
  expect<WideStates<T, 4>>("proxy_relevancy_scores", sizeof(ProxySums), false, 16);
  expect<NarrowStates<T, 1>>("proxy_relevancy_scores", sizeof(ProxySums), false);
  expect<NarrowStates<T, 4>>("proxy_relevancy_scores", sizeof(ProxySums), false);
}

FASTXAI_EXPECT(proxy_relevancy, expect_scores);
