// The rows of one sample that a kernel has to look at.
#pragma once

#include <cstdint>

namespace fastxai::cpu {

struct RowList {
  const int32_t* index;  // increasing
  int64_t count;
};

}  // namespace fastxai::cpu
