// C launchers of y = act(a*x + b + residual), a = mask*scale, b = shift - a*center per channel, and of its backward.
#pragma once

#include "cuda/launch.h"

extern "C" {

struct MnpAffine {
  int64_t n, c, s;     // samples, channels, positions
  bool channels_last;  // memory is (n, s, c), else (n, c, s)
  bool relu;
  int64_t dtype;  // MnpDType
  int32_t device;
  void* stream;  // cudaStream_t
  const float *mask, *scale, *center, *shift;
};

struct MnpAffineForward {
  MnpAffine affine;
  const void *x, *residual;  // residual may be null
  void* y;
};

struct MnpAffineBackward {
  MnpAffine affine;
  const void *grad, *x, *y;      // y null: with relu the sign is recomputed from x
  void *grad_x, *grad_residual;  // null: not needed
  float *sum_g, *sum_gx;         // (n, c)
  float* partial;                // mnp_masked_affine_partial() numbers, may be null for 0
};

int mnp_masked_affine_forward(const MnpAffineForward*);
int mnp_masked_affine_backward(const MnpAffineBackward*);
// Numbers of scratch memory that the backward needs for these sizes.
int64_t mnp_masked_affine_partial(int64_t n, int64_t c, int64_t s, bool channels_last);
// Why these kernels cannot run on the device: an error code of the runtime, 0 if they can.
int mnp_masked_affine_check(int32_t device);
}
