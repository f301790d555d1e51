// What the CUDA glue of every op shares.
#pragma once

#include "cuda/launch.h"
#include "torch/common.h"

namespace mnp_fast {

inline void check_launch(int code) { STD_TORCH_CHECK(code == 0, "CUDA launch failed: ", mnp_cuda_error_string(code)); }

inline MnpDType dtype_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cuda(), name, " is not on a CUDA device");
  if (x.scalar_type() == ScalarType::Float) return kMnpFloat32;
  if (x.scalar_type() == ScalarType::BFloat16) return kMnpBFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, name, " is none of float32, bfloat16 and float16");
  return kMnpFloat16;
}

}  // namespace mnp_fast
