// How kernels with one coefficient a channel see memory, and how their work is cut into units.
//
// Work is handed out as a range of units, so that the caller may spread units over threads; what a unit computes never
// depends on the range that it came in.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace mnp_fast::cpu {

// Memory is a sequence of samples, each of `positions` x `row` numbers in one of two orders:
//  - channels outside: a row is all `row` positions of a channel; coefficients are indexed by row % channels.
//  - channels inside (channels_last): a row is `row` = channels * repeats numbers, several positions of a few channels
//    together where there are few channels; coefficients come repeated to `row` entries. The last row may be cut short.
// A unit is a row.
struct Rows {
  DType dtype;
  bool channels_last;
  int64_t channels;
  int64_t row;
  int64_t total;  // numbers in memory
  bool streamed;  // results go past the cache; each begins at a multiple of 64 bytes
};

// For sums over the positions of a sample. Channels outside: a unit is a row and leaves one sum. Channels inside: a
// unit is the block of rows [block * block_rows, ...) of one sample and leaves `row` sums; rows end with the sample.
struct Blocks {
  Rows rows;
  int64_t sample;  // numbers in a sample
  int64_t blocks;  // units of a sample
  int64_t block_rows;
};

}  // namespace mnp_fast::cpu
