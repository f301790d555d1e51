// 3x3 convolution with stride 1 in float32, F(4x4, 3x3) of Lavin and Gray, arXiv 1509.09308: 36 products where the
// plain sum takes 144.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mnp_fast::cpu {

// Tile: 4x4 positions of the result and the 6x6 of x that they need. Panel: kPanel channels of the result.
inline constexpr int64_t kTile = 4, kTileInput = 6, kTilePoints = 36, kPanel = 32;
// Numbers between two rows beyond their channels: rows at powers of two would share one set of the cache.
inline constexpr int64_t kRowGap = 16;

struct Winograd {
  int64_t in, out;        // channels
  int64_t height, width;  // of x
  int64_t pad_h, pad_w;   // zeros on each side of x
  int64_t out_h, out_w;   // of y
  int64_t tiles_h, tiles_w;
  const float* x;  // (n, height, width, in)
  const float* u;  // transformed weights (36, panels, in, kPanel), zero beyond `out`
  float* y;        // (n, out_h, out_w, out)

  // Tiles that pass through all stages together: the 36 weights of each pair of channels are read once for so many, and
  // what the stages hand on should stay in the cache where the weights do.
  int64_t at_once() const { return in * out < 128 * 128 ? 24 : 96; }
  int64_t panels() const { return (out + kPanel - 1) / kPanel; }
  // Rows of the transformed input, and of the products before they are transformed back.
  int64_t input_row() const { return in + kRowGap; }
  int64_t product_row() const { return panels() * kPanel + kRowGap; }
  int64_t workspace() const { return kTilePoints * at_once() * (input_row() + product_row()); }
};

struct WinogradKernels {
  // Tiles [begin, end) of all pictures, at most at_once(); `space` holds workspace() numbers.
  void (*run)(const Winograd&, int64_t begin, int64_t end, float* space);
};

MNP_DECLARE_KERNELS(WinogradKernels, winograd)

}  // namespace mnp_fast::cpu
