// How the CUDA kernels of ops with one coefficient a channel go through memory, and how they add up.
//
// Channels outside, (n, c, s): element by element in a line; sums by planes of s numbers, each given to a group of
// threads. Channels inside, (n, s, c): a thread owns a few neighbouring channels and walks down the rows.
#pragma once

#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/masked_affine.h"

namespace mnp_fast::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kRowsPerThread = 16;
// Planes no longer than this are summed by a warp each, longer ones by a block each.
inline constexpr int64_t kWarpPlane = 1024;

// Coefficients of a*x + b.
struct AffineChannel {
  float a, b;
};

__device__ __forceinline__ AffineChannel affine_channel(const MnpAffine& p, int64_t c) {
  const float a = p.mask[c] * p.scale[c];
  return {a, fmaf(-a, p.center[c], p.shift[c])};
}

// An elementwise `Op` has the type `Number` of its tensors; `channel(c)`, the coefficients of channel c; and
// `pack<V>(i, at)`, which does the V numbers at offset i, where at(k) gives the coefficients of number k, asked for in
// order and once each.

// --- Elementwise, memory in a line: every thread takes V numbers in a row, of one channel each `s` numbers
template <class Op, int V, class Index>
__global__ void __launch_bounds__(kThreads) elementwise_line(Op op, Index channels, Index s, Index total) {
  const bool one_channel = s % V == 0;
  const Index start = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (start >= total) return;
  const Index plane = start / s;
  Index offset = start - plane * s;
  Index c = plane % channels;
  auto coefficients = op.channel(c);
  // The next number's channel; asked only where a pack may reach into another plane.
  const auto advance = [&] {
    if (++offset == s) {
      offset = 0;
      if (++c == channels) c = 0;
      coefficients = op.channel(c);
    }
  };
  if (total - start >= V) {
    op.template pack<V>(start, [&](int k) {
      if (!one_channel && k > 0) advance();
      return coefficients;
    });
  } else {
    for (Index i = start; i < total; ++i) {
      if (i > start) advance();
      op.template pack<1>(i, [&](int) { return coefficients; });
    }
  }
}

// --- Elementwise, channels inside: a thread owns V channels of kRowsPerThread rows; V divides the channels
template <class Op, int V>
__global__ void __launch_bounds__(kThreads) elementwise_columns(Op op, int64_t channels, int64_t rows) {
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= channels) return;
  decltype(op.channel(c)) coefficients[V];
#pragma unroll
  for (int i = 0; i < V; ++i) coefficients[i] = op.channel(c + i);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kRowsPerThread;
  const int64_t last = first + static_cast<int64_t>(blockDim.y) * kRowsPerThread;
  const int64_t end = (last < rows ? last : rows) * channels, step = blockDim.y * channels;
#pragma unroll 4
  for (int64_t i = (first + threadIdx.y) * channels + c; i < end; i += step) {
    op.template pack<V>(i, [&](int k) { return coefficients[k]; });
  }
}

// A block of kThreads: as many threads across as a row has packs, at most a warp, and the rest down the rows.
inline dim3 columns_block(int64_t packs) {
  unsigned int across = 1;
  while (across < kWarp && across < packs) across *= 2;
  return dim3(across, kThreads / across);
}

// `wide`: all tensors of the op begin at a multiple of 16 bytes.
template <class Op>
int launch_elementwise(const Op& op, const MnpAffine& sizes, bool wide) {
  constexpr int kV = kPerAccess<typename Op::Number>;
  const auto stream = static_cast<cudaStream_t>(sizes.stream);
  const int64_t total = sizes.n * sizes.c * sizes.s;
  if (sizes.channels_last && wide && sizes.c % kV == 0) {
    const int64_t rows = sizes.n * sizes.s, packs = sizes.c / kV;
    const dim3 block = columns_block(packs);
    const dim3 grid(static_cast<unsigned int>(ceil_div(rows, static_cast<int64_t>(block.y) * kRowsPerThread)),
                    static_cast<unsigned int>(ceil_div(packs, block.x)));
    elementwise_columns<Op, kV><<<grid, block, 0, stream>>>(op, sizes.c, rows);
    return cudaGetLastError();
  }
  // Channels inside are planes of one number to the kernel that goes through memory in a line.
  const int64_t s = sizes.channels_last ? 1 : sizes.s;
  const auto launch = [&](auto width, auto index) {
    using Index = decltype(index);
    constexpr int kWidth = decltype(width)::value;
    const auto blocks = static_cast<unsigned int>(ceil_div(ceil_div(total, kWidth), kThreads));
    elementwise_line<Op, kWidth, Index><<<blocks, kThreads, 0, stream>>>(
        op, static_cast<Index>(sizes.c), static_cast<Index>(s), static_cast<Index>(total));
  };
  // 32-bit division is several times cheaper; threads reach up to one block beyond the end.
  const bool small = total < (int64_t{1} << 31);
  const std::integral_constant<int, kV> packs;
  const std::integral_constant<int, 1> singles;
  if (wide) {
    small ? launch(packs, uint32_t{}) : launch(packs, uint64_t{});
  } else {
    small ? launch(singles, uint32_t{}) : launch(singles, uint64_t{});
  }
  return cudaGetLastError();
}

// --- Sums of planes: `kGroup` threads for each, kGroup a warp or the block
// Bases are multiples of 16 bytes, planes need not be: the numbers before the first whole pack and behind the last are
// taken one by one. body(width, i) for the numbers at offset i.
template <int V, int kGroup, class Body>
__device__ __forceinline__ void for_plane(int64_t base, int64_t s, int lane, Body body) {
  const std::integral_constant<int, V> packed;
  const std::integral_constant<int, 1> single;
  int64_t head = (V - base % V) % V;
  if (head > s) head = s;
  const int64_t packs = (s - head) / V;
  const int64_t tail = head + packs * V;
  for (int64_t i = lane; i < head; i += kGroup) body(single, base + i);
  for (int64_t i = lane; i < packs; i += kGroup) body(packed, base + head + i * V);
  for (int64_t i = tail + lane; i < s; i += kGroup) body(single, base + i);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// Two sums over the threads of a group, which lane 0 then has. Every thread of the group calls it.
template <int kGroup>
__device__ __forceinline__ void group_sums(int lane, float& a, float& b) {
  a = warp_sum(a);
  b = warp_sum(b);
  if constexpr (kGroup > kWarp) {
    __shared__ float sums[2][kGroup / kWarp];
    if (lane % kWarp == 0) {
      sums[0][lane / kWarp] = a;
      sums[1][lane / kWarp] = b;
    }
    __syncthreads();
    if (lane == 0) {
      for (int w = 1; w < kGroup / kWarp; ++w) {
        a += sums[0][w];
        b += sums[1][w];
      }
    }
  }
}

// --- Sums of columns: a block takes blockDim.x * V channels of one chunk of rows
// Rows of a chunk follow from the sizes alone: whoever allocates the scratch memory does not know the width of an
// access.
inline int64_t chunk_rows(int64_t c) {
  const dim3 block = columns_block(ceil_div(c, 4));
  return static_cast<int64_t>(block.y) * kRowsPerThread;
}

// Two sums for each of the block's columns, which begin at channel `tile`, to out + channel. Every thread calls it.
template <int V>
__device__ __forceinline__ void column_sums(const float* a, const float* b, int64_t tile, int64_t channels,
                                            float* out_a, float* out_b) {
  __shared__ float sums[2][kThreads * V];
  const int width = blockDim.x * V;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sums[0][threadIdx.y * width + threadIdx.x * V + i] = a[i];
    sums[1][threadIdx.y * width + threadIdx.x * V + i] = b[i];
  }
  __syncthreads();
  for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += kThreads) {
    if (tile + column >= channels) continue;
    float total_a = 0.0f, total_b = 0.0f;
    for (int row = 0; row < blockDim.y; ++row) {
      total_a += sums[0][row * width + column];
      total_b += sums[1][row * width + column];
    }
    out_a[tile + column] = total_a;
    out_b[tile + column] = total_b;
  }
}

}  // namespace mnp_fast::cuda
