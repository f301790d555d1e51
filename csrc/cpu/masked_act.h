// y = mask*act(x) per channel, and its backward, for dense memory.
#pragma once

#include <cstdint>

#include "act.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace mnp_fast::cpu {

struct MaskedActForward {
  Rows rows;
  Act act;
  const void* x;
  void* y;
  const float* mask;
};

struct MaskedActBackward {
  Blocks blocks;
  Act act;
  const void* grad;
  const void* x;
  void* grad_x;  // null: not needed
  const float* mask;
  float* sum_gact;  // channels outside: one number a unit; inside: `row` numbers a unit
};

struct MaskedActKernels {
  // Units of Rows.
  void (*forward)(const MaskedActForward&, int64_t begin, int64_t end);
  // Units of Blocks.
  void (*backward)(const MaskedActBackward&, int64_t begin, int64_t end);
};

MNP_DECLARE_KERNELS(MaskedActKernels, masked_act)

}  // namespace mnp_fast::cpu
