// What the CPU glue of every op needs.
#pragma once

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "torch/common.h"

namespace mnp_fast {

// As much as one thread should get at least: what at::parallel_for takes for its own elementwise kernels.
inline constexpr int64_t kGrain = 32768;

inline cpu::Isa usable_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa < cpu::kIsaCount && cpu::isa_usable(static_cast<cpu::Isa>(isa)),
                  "this processor cannot run instruction set ", isa);
  return static_cast<cpu::Isa>(isa);
}

inline cpu::DType dtype_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " is not on the CPU");
  if (x.scalar_type() == ScalarType::Float) return cpu::DType::float32;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, name, " is neither float32 nor bfloat16");
  return cpu::DType::bfloat16;
}

}  // namespace mnp_fast
