// y = act(a*x + b + residual) with a = mask*scale, b = shift - a*center per channel, and its backward, for dense
// memory.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace mnp_fast::cpu {

struct MaskedAffineForward {
  Rows rows;
  bool relu;
  const void* x;
  const void* residual;  // may be null
  void* y;
  const float* a;
  const float* b;
  // null: not kept. With relu, a residual and channels inside, rows being multiples of 16: one bit a number, set where
  // the relu lets the gradient through.
  uint8_t* signs;
};

struct MaskedAffineBackward {
  Blocks blocks;
  bool relu;
  const void* grad;
  const void* x;
  const void* y;         // null: with relu the sign is that of `signs`, or recomputed from x
  const uint8_t* signs;  // as the forward keeps them, or null
  void* grad_x;          // null: not needed; may be grad
  void* grad_residual;   // null: not needed; may be grad
  const float* a;
  const float* b;
  const float* center;
  float* sum_g;   // channels outside: one number a unit; inside: `row` numbers a unit
  float* sum_gx;  // likewise
};

struct MaskedAffineKernels {
  // Units of Rows.
  void (*forward)(const MaskedAffineForward&, int64_t begin, int64_t end);
  // Units of Blocks.
  void (*backward)(const MaskedAffineBackward&, int64_t begin, int64_t end);
};

MNP_DECLARE_KERNELS(MaskedAffineKernels, masked_affine)

}  // namespace mnp_fast::cpu
