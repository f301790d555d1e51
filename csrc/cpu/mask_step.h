// One step of the masks: momentum = decay*momentum + grad + penalty*magnitude, mask = clamp(mask - rate*momentum, 0,
// 1).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mnp_fast::cpu {

struct MaskStep {
  float* mask;
  float* momentum;
  const float* grad;
  const float* magnitude;
  float rate, decay, penalty;
};

struct MaskStepKernels {
  // For the neurons [begin, end).
  void (*step)(const MaskStep&, int64_t begin, int64_t end);
};

MNP_DECLARE_KERNELS(MaskStepKernels, mask_step)

}  // namespace mnp_fast::cpu
