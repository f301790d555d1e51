// y = act(a*x + b + residual) with a = mask*scale, b = shift - a*center per channel, and its backward, for dense
// memory.
//
// Work is handed out as a range of units, so that the caller may spread units over threads; what a unit computes never
// depends on the range that it came in.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mnp_fast::cpu {

enum class DType : int64_t { float32 = 0, bfloat16 = 1 };

// Memory is a sequence of samples, each of `positions` x `row` numbers in one of two orders:
//  - channels outside: a unit is one row, all `row` positions of a channel; coefficients are indexed by row % channels.
//  - channels inside (channels_last): a row is `row` = channels * repeats numbers, several positions of a few channels
//    together where there are few channels; coefficients come repeated to `row` entries. The last row may be cut short.
struct MaskedAffineForward {
  DType dtype;
  bool relu;
  bool channels_last;
  const void* x;
  const void* residual;  // may be null
  void* y;
  const float* a;
  const float* b;
  int64_t channels;
  int64_t row;
  int64_t total;  // numbers in x
};

struct MaskedAffineBackward {
  DType dtype;
  bool relu;
  bool channels_last;
  const void* grad;
  const void* x;
  const void* y;        // null: with relu the sign is recomputed from x
  void* grad_x;         // null: not needed
  void* grad_residual;  // null: not needed
  const float* a;
  const float* b;
  const float* center;
  float* sum_g;   // channels outside: one number a unit; inside: `row` numbers a unit
  float* sum_gx;  // likewise
  int64_t channels;
  int64_t row;
  // Channels inside: a unit is the block of rows [block * block_rows, ...) of one sample.
  int64_t sample;  // numbers in a sample
  int64_t blocks;  // units of a sample
  int64_t block_rows;
};

struct MaskedAffineKernels {
  // Units: rows of x.
  void (*forward)(const MaskedAffineForward&, int64_t begin, int64_t end);
  // Units: rows of x where channels are outside, blocks of rows where they are inside.
  void (*backward)(const MaskedAffineBackward&, int64_t begin, int64_t end);
};

MNP_DECLARE_KERNELS(MaskedAffineKernels, masked_affine)

}  // namespace mnp_fast::cpu
