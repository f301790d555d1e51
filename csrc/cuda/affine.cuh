// What masked_affine and masked_batch_norm share: the coefficients of a channel.
#pragma once

#include "cuda/loops.cuh"
#include "cuda/masked_affine.h"

namespace mnp_fast::cuda {

// Coefficients of a*x + b.
struct AffineChannel {
  float a, b;
};

__device__ __forceinline__ AffineChannel affine_channel(const MnpAffine& p, int64_t c) {
  const float a = p.mask[c] * p.scale[c];
  return {a, fmaf(-a, p.center[c], p.shift[c])};
}

}  // namespace mnp_fast::cuda
