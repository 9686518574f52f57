// Prints the most shared memory, in bytes, that a launch of each kernel asks for. Run by .ci/cuda_kernels.py, which
// complains when a kernel is missing here.

#include <cxxabi.h>

#include <typeinfo>

#include "cuda_on_host.h"

#include "../../csrc/cuda/attention_backward_relevancy.cuh"
#include "../../csrc/cuda/glimpse_statistics.cuh"
#include "../../csrc/cuda/proxy_relevancy.cuh"
#include "../../csrc/cuda/relevancy_product.cuh"

using namespace fastxai::cuda;

template <typename Tiles>
void print(const char* kernel, int64_t bytes) {
  std::printf("%lld %s<%s >\n", static_cast<long long>(bytes), kernel,
              abi::__cxa_demangle(typeid(Tiles).name(), nullptr, nullptr, nullptr));
}

template <typename... Tiles>
void print_columns() {
  (print<Tiles>("relevancy_product_columns", shared_bytes<Tiles>(Tiles::kMaxTargets, kMaxListed)), ...);
}

template <typename... Tiles>
void print_backward_keys() {
  (print<Tiles>("backward_keys", backward_keys_bytes<Tiles>(kMaxListed)), ...);
}

template <typename... Tiles>
void print_backward_rows() {
  (print<Tiles>("backward_rows", Tiles::kSharedBytes), ...);
}

template <typename... Tiles>
void print_statistics() {
  (print<Tiles>("glimpse_statistics_rows", statistics_bytes<Tiles>()), ...);
}

template <typename T>
void print_scores() {
  print<WideStates<T, 1>>("proxy_relevancy_scores", sizeof(ProxySums));
  print<WideStates<T, 4>>("proxy_relevancy_scores", sizeof(ProxySums));
  print<NarrowStates<T, 1>>("proxy_relevancy_scores", sizeof(ProxySums));
  print<NarrowStates<T, 4>>("proxy_relevancy_scores", sizeof(ProxySums));
}

template <typename T>
void print_16_bit() {
  print_scores<T>();
  print_columns<FmaTiles<T>, TensorCoreTiles<T, 64>, TensorCoreTiles<T, 96>, TensorCoreTiles<T, 128>,
                TensorCoreTiles<T, 256>>();
  print_backward_keys<FmaPairs<T, 2>, TensorCorePairs<T, 64, 2>, TensorCorePairs<T, 96, 2>, TensorCorePairs<T, 128, 2>,
                      TensorCorePairs<T, 256, 2>>();
  print_backward_rows<FmaPairs<T, 1>, TensorCorePairs<T, 64, 1>, TensorCorePairs<T, 96, 1>, TensorCorePairs<T, 128, 1>,
                      TensorCorePairs<T, 256, 1>>();
  print_statistics<FmaSides<T>, TensorCoreSides<T>>();
}

int main() {
  print_scores<float>();
  print_columns<FmaTiles<float>>();
  print_backward_keys<FmaPairs<float, 2>>();
  print_backward_rows<FmaPairs<float, 1>>();
  print_statistics<FmaSides<float>>();
  print_16_bit<BFloat16>();
  print_16_bit<Float16>();
}
