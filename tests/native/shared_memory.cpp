// Prints the most shared memory, in bytes, that a launch of each kernel asks for. Run by .ci/cuda_kernels.py, which
// complains when a kernel is missing here.

#include <cxxabi.h>

#include <typeinfo>

#include "cuda_on_host.h"

#include "../../csrc/cuda/relevancy_product.cuh"

using namespace fastxai::cuda;

template <typename... Tiles>
void print() {
  const auto line = [](int64_t bytes, const char* mangled) {
    std::printf("%lld relevancy_product_columns<%s >\n", static_cast<long long>(bytes),
                abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr));
  };
  (line(shared_bytes<Tiles>(Tiles::kMaxTargets, kMaxListed), typeid(Tiles).name()), ...);
}

template <typename T>
void print_16_bit() {
  print<FmaTiles<T>, TensorCoreTiles<T, 64>, TensorCoreTiles<T, 96>, TensorCoreTiles<T, 128>,
        TensorCoreTiles<T, 256>>();
}

int main() {
  print<FmaTiles<float>>();
  print_16_bit<BFloat16>();
  print_16_bit<Float16>();
}
