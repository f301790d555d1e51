// C launcher of one step of the masks: momentum = decay*momentum + grad + penalty*magnitude, then
// mask = clamp(mask - rate*momentum, 0, 1), both in place.
#pragma once

#include "cuda/launch.h"

extern "C" {

struct MnpMaskStep {
  float *mask, *momentum;
  const float *grad, *magnitude;
  int64_t n;
  float rate, decay, penalty;
  int32_t device;
  void* stream;  // cudaStream_t
};

int mnp_mask_step(const MnpMaskStep*);
}
