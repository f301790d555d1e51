// C launchers of y = mask*act(x) per channel, and of its backward.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

extern "C" {

struct MnpAct {
  int64_t n, c, s;     // samples, channels, positions
  bool channels_last;  // memory is (n, s, c), else (n, c, s)
  int64_t act;         // mnp_fast::Act
  int64_t dtype;       // MnpDType
  int32_t device;
  void* stream;  // cudaStream_t
  const float* mask;
};

struct MnpActForward {
  MnpAct act;
  const void* x;
  void* y;
};

struct MnpActBackward {
  MnpAct act;
  const void *grad, *x;
  void* grad_x;     // null: not needed
  float* sum_gact;  // (n, c)
  float* partial;   // mnp_masked_act_partial() numbers, may be null for 0
};

int mnp_masked_act_forward(const MnpActForward*);
int mnp_masked_act_backward(const MnpActBackward*);
// Numbers of scratch memory that the backward needs for these sizes.
int64_t mnp_masked_act_partial(int64_t n, int64_t c, int64_t s, bool channels_last);
}
