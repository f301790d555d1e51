// Types of the numbers that the CPU kernels read and write.
#pragma once

#include <cstdint>

namespace mnp_fast::cpu {

enum class DType : int64_t { float32 = 0, bfloat16 = 1 };

}  // namespace mnp_fast::cpu
