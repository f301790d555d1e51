// C launcher of the L1 norm, L2 norm and largest absolute value of every row of several tensors.
#pragma once

#include "cuda/launch.h"

extern "C" {

// Rows of `length` numbers that lie one after the other.
struct MnpMagnitudeRows {
  const void* data;
  int64_t rows, length;
};

struct MnpChannelMagnitude {
  const MnpMagnitudeRows* tensors;  // host memory, not read after the call
  int64_t count;
  int64_t total;  // rows of all tensors, less than 2^31
  int64_t dtype;  // MnpDType
  int32_t device;
  void* stream;  // cudaStream_t
  float* out;    // (3, total)
};

int mnp_channel_magnitude(const MnpChannelMagnitude*);
}
