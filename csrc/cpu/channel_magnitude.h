// L1 norm, L2 norm and largest absolute value of every row of several tensors.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mnp_fast::cpu {

// What a row costs beside its numbers, in numbers.
inline constexpr int64_t kRowCost = 16;

// Rows of `length` numbers that lie one after the other.
struct MagnitudeRows {
  const void* data;
  int64_t rows;
  int64_t length;
  int64_t first;  // index of the first row among those of all tensors
  int64_t start;  // cost of all rows before the first; a row costs length + kRowCost
};

struct ChannelMagnitude {
  const MagnitudeRows* tensors;
  int64_t count;
  int64_t total;  // rows of all tensors
  float* out;     // (3, total)
};

// Work is handed out as a range of cost, which spreads it evenly: rows whose cost begins in [begin, end) are computed,
// each as a whole, so that no sum depends on the range.
struct ChannelMagnitudeKernels {
  void (*float32)(const ChannelMagnitude&, int64_t begin, int64_t end);
  void (*bfloat16)(const ChannelMagnitude&, int64_t begin, int64_t end);
};

MNP_DECLARE_KERNELS(ChannelMagnitudeKernels, channel_magnitude)

}  // namespace mnp_fast::cpu
