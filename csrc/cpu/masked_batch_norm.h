// What masked_batch_norm needs besides the kernels of masked_affine, which normalise and leave the sums of the
// backward: sums for the statistics of the batch, and the gradient of x through them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/masked_affine.h"

namespace mnp_fast::cpu {

// Rows and order of memory as in masked_affine.h, but rows with the channels inside go on from one sample to the next.
struct BatchNormSums {
  DType dtype;
  bool channels_last;
  const void* x;
  // A unit leaves, for each of its columns, a number k within the data, the sum of x - k, and that of its square.
  // Channels outside: one column a unit; inside: `row` columns, zeros where the unit has no row of them.
  float* k;
  float* sum;
  float* square;
  int64_t row;
  int64_t total;       // numbers in x
  int64_t block_rows;  // rows in a unit where channels are inside
};

// grad_x = a*g' + p*(x - center) + q per channel, g' being the gradient behind the activation.
struct BatchNormGradX {
  DType dtype;
  bool relu;
  bool channels_last;
  const void* grad;
  const void* x;
  const void* y;  // null: with relu the sign is that of a*x + b
  void* grad_x;
  const float* a;
  const float* b;
  const float* center;
  const float* p;
  const float* q;
  int64_t channels;
  int64_t row;
  int64_t total;
};

struct MaskedBatchNormKernels {
  // Units: rows of x where channels are outside, blocks of rows where they are inside.
  void (*sums)(const BatchNormSums&, int64_t begin, int64_t end);
  // Units: rows of x.
  void (*grad_x)(const BatchNormGradX&, int64_t begin, int64_t end);
};

MNP_DECLARE_KERNELS(MaskedBatchNormKernels, masked_batch_norm)

}  // namespace mnp_fast::cpu
