// What the kernels with one coefficient a channel share: the shape of a block, walks along planes, sums of each sample.
#pragma once

#include <type_traits>

#include "cuda/common.cuh"

namespace mnp_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 16;
// Planes no longer than this are summed by a warp each, longer ones by a block each.
constexpr int64_t kWarpPlane = 1024;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// body(width, i) for what thread `lane` of kGroup takes of the s numbers from `base` on. Bases are multiples of 16
// bytes, planes need not be: the numbers before the first whole pack of V and behind the last are taken one by one.
template <int V, int kGroup, class Body>
__device__ __forceinline__ void for_plane(int64_t base, int64_t s, int lane, Body body) {
  const std::integral_constant<int, V> pack{};
  const std::integral_constant<int, 1> single{};
  int64_t head = (V - base % V) % V;
  if (head > s) head = s;
  const int64_t packs = (s - head) / V;
  const int64_t tail = head + packs * V;
  for (int64_t i = lane; i < head; i += kGroup) body(single, base + i);
  for (int64_t i = lane; i < packs; i += kGroup) body(pack, base + head + i * V);
  for (int64_t i = tail + lane; i < s; i += kGroup) body(single, base + i);
}

// Adds up the chunks of each sample, first to last. `partial` holds n * chunks * c numbers for `first`, and as many
// behind them for `second` where it is not null; total = n * c.
__global__ void __launch_bounds__(kThreads)
    add_chunks(const float* partial, float* first, float* second, int64_t total, int64_t c, int64_t chunks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const float* values = partial + i / c * chunks * c + i % c;
  float sum_first = 0.0f, sum_second = 0.0f;
  for (int64_t k = 0; k < chunks; ++k) {
    sum_first += values[k * c];
    if (second != nullptr) sum_second += values[total * chunks + k * c];
  }
  first[i] = sum_first;
  if (second != nullptr) second[i] = sum_second;
}

// A block of kThreads: as many threads across as a row has packs, at most a warp, and the rest down the rows.
inline dim3 columns_block(int64_t packs) {
  unsigned int across = 1;
  while (across < kWarp && across < packs) across *= 2;
  return dim3(across, kThreads / across);
}

// Rows of a chunk follow from the sizes alone: whoever allocates the scratch memory does not know the width of an
// access.
inline int64_t chunk_rows(int64_t c) {
  const dim3 block = columns_block(ceil_div(c, 4));
  return static_cast<int64_t>(block.y) * kRowsPerThread;
}

// Numbers of scratch memory for one sum of each sample and channel.
inline int64_t partial_sums(int64_t n, int64_t c, int64_t s, bool channels_last) {
  if (!channels_last) return 0;
  const int64_t chunks = ceil_div(s, chunk_rows(c));
  return chunks > 1 ? n * chunks * c : 0;
}

}  // namespace
}  // namespace mnp_fast::cuda
