// The CUDA kernels compiled for the host; the operators' own files come by -include. As a library, test_cuda_on_host.py
// calls their launches. As a program, .ci/cuda_kernels.py reads what is expected of each kernel: the most shared
// memory, whether it multiplies matrices, how many 16-byte loads it makes at least, its name.

#include "launch_on_host.h"

int main() {
  for (const Expected& kernel : expected_kernels()) {
    std::printf("%lld %d %d %s\n", static_cast<long long>(kernel.shared_bytes), kernel.multiplies, kernel.loads,
                kernel.name.c_str());
  }
}
