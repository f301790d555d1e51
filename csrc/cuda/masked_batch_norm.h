// C launchers of what masked_batch_norm needs besides those of masked_affine, which normalises and leaves the sums of
// the backward: the statistics of the batch, and the gradient of x through them. Conventions as in masked_affine.h.
#pragma once

#include <cstdint>

#include "cuda/masked_affine.h"

extern "C" {

struct MnpBatchNormStatistics {
  MnpAffine affine;  // sizes alone: the coefficients are what comes out
  const void* x;     // not empty
  const float* weight;
  double eps;
  float *mean, *rstd, *scale;  // (c,), scale = weight * rstd
  float* partial;              // mnp_masked_batch_norm_partial() numbers
};

// grad_x = a*g' + slope*(x - center) + offset, a = mask*scale, g' the gradient behind the activation.
struct MnpBatchNormGradX {
  MnpAffine affine;          // center is the mean, scale = weight * rstd
  const void *grad, *x, *y;  // y null: with relu the sign is recomputed from x
  void* grad_x;
  const float* rstd;
  const float* sum_g;  // (n, c)
  float* sum_gx;       // (n, c): that of g'*(x - mean) on entry, of g'*xhat on return
  float* slope;        // (c,), scratch
  float* offset;       // (c,), scratch
};

int mnp_masked_batch_norm_statistics(const MnpBatchNormStatistics*);
// With grad_x null only sum_gx is completed.
int mnp_masked_batch_norm_grad_x(const MnpBatchNormGradX*);
// Numbers of scratch memory that the statistics need for these sizes.
int64_t mnp_masked_batch_norm_partial(int64_t n, int64_t c, int64_t s, bool channels_last);
}
