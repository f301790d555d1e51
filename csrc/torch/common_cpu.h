// What the glue of the CPU kernels of every op needs.
#pragma once

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

}  // namespace mnp_fast
