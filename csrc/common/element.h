// Element types of the tensors that kernels read. No torch types: kernels compile without torch headers.
#pragma once

#include <cstdint>

namespace fastxai {

enum class Element : int32_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace fastxai
