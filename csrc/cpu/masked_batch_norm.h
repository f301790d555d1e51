// What masked_batch_norm needs besides the kernels of masked_affine, which normalise and leave the sums of the
// backward: sums for the statistics of the batch, and the gradient of x through them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace mnp_fast::cpu {

struct BatchNormSums {
  Rows rows;
  const void* x;
  // A unit leaves, for each of its columns, a number k within the data, the sum of x - k, and that of its square.
  // Channels outside: one column a unit; inside: `row` columns, zeros where the unit has no row of them.
  float* k;
  float* sum;
  float* square;
  int64_t block_rows;  // rows in a unit where channels are inside
};

// grad_x = a*g' + p*(x - center) + q per channel, g' being the gradient behind the activation.
struct BatchNormGradX {
  Rows rows;
  bool relu;
  const void* grad;
  const void* x;
  const void* y;  // null: with relu the sign is that of a*x + b
  void* grad_x;
  const float* a;
  const float* b;
  const float* center;
  const float* p;
  const float* q;
};

struct MaskedBatchNormKernels {
  // Units: rows of x where channels are outside, blocks of rows where they are inside.
  void (*sums)(const BatchNormSums&, int64_t begin, int64_t end);
  // Units: rows of x.
  void (*grad_x)(const BatchNormGradX&, int64_t begin, int64_t end);
};

MNP_DECLARE_KERNELS(MaskedBatchNormKernels, masked_batch_norm)

}  // namespace mnp_fast::cpu
