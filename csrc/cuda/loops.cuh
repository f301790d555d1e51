// How the CUDA kernels of ops with one coefficient a channel go through memory, and how they add up.
//
// Channels outside, (n, c, s): element by element in a line; sums by planes of s numbers, each given to a group of
// threads. Channels inside, (n, s, c): a thread owns a few neighbouring channels and walks down the rows.
//
// An `Op` has the type `Number` of its tensors; `channel(c)`, the coefficients of channel c; `read<V>(i)`, what it
// needs of the V numbers at offset i; and `write<V>(i, read, at)`, which does them, where at(k) gives the coefficients
// of number k, asked for in order and once each. An op with sums has kSums of them, and `write<V>(i, read, at, sums)`
// adds to the floats sums(k) of number k. kInFlight: how many packs a thread that walks down rows reads before it uses
// the first.
#pragma once

#include <type_traits>

#include "cuda/common.cuh"

namespace mnp_fast::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kRowsPerThread = 16;
// Numbers of a pack where every number has coefficients and sums of its own. Eight of bfloat16 leave too few warps: on
// an H100 .75 to .89 of a copy in place of .91 to .98.
inline constexpr int kSumsPack = 4;
// Planes no longer than this are summed by a part of a warp each, longer ones by a warp or by a block.
inline constexpr int kPart = 8;
inline constexpr int64_t kPartPlane = 128, kWarpPlane = 4096;
// Rows of a thread that sums, at most; blocks that keep a GPU busy: with fewer, rows are divided further.
inline constexpr int64_t kSumRows = 32, kBlocks = 256;

// `sums` of them for each of the floats that are to be added up.
template <int kSums>
struct Sums {
  float* to[kSums];
};

// use(i, read(i)) for i, i + step, ... before `end`, with kInFlight reads under way before the first is used. The
// compiler does not move a read in front of a write to what may be the same memory, so that reads are put in front
// here.
template <int kInFlight, class Read, class Use>
__device__ __forceinline__ void walk(int64_t i, int64_t end, int64_t step, Read read, Use use) {
  for (; i < end; i += kInFlight * step) {
    decltype(read(i)) found[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (i + k * step < end) found[k] = read(i + k * step);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (i + k * step < end) use(i + k * step, found[k]);
    }
  }
}

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
    op.template write<V>(start, op.template read<V>(start), [&](int k) {
      if (!one_channel && k > 0) advance();
      return coefficients;
    });
  } else {
    for (Index i = start; i < total; ++i) {
      if (i > start) advance();
      op.template write<1>(i, op.template read<1>(i), [&](int) { return coefficients; });
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
  walk<Op::kInFlight>(
      (first + threadIdx.y) * channels + c, (last < rows ? last : rows) * channels, blockDim.y * channels,
      [&](int64_t i) { return op.template read<V>(i); },
      [&](int64_t i, const auto& found) { op.template write<V>(i, found, [&](int k) { return coefficients[k]; }); });
}

// A block of kThreads: as many threads across as a row has packs, at most a warp, and the rest down the rows.
inline dim3 columns_block(int64_t packs) {
  unsigned int across = 1;
  while (across < kWarp && across < packs) across *= 2;
  return dim3(across, kThreads / across);
}

// `sizes`: n, c, s, channels_last and stream. `wide`: all tensors of the op begin at a multiple of 16 bytes.
template <class Op, class Sizes>
int launch_elementwise(const Op& op, const Sizes& sizes, bool wide) {
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

// --- Sums of planes: `kGroup` threads for each, kGroup a part of a warp, a warp or the block
// Bases are multiples of 16 bytes, planes need not be: the numbers before the first whole pack and behind the last are
// taken one by one. read(width, i) and use(width, i, read) for the numbers at offset i.
template <int V, int kGroup, class Read, class Use>
__device__ __forceinline__ void for_plane(int64_t base, int64_t s, int lane, Read read, Use use) {
  const std::integral_constant<int, V> packed;
  const std::integral_constant<int, 1> single;
  const int64_t end = base + s;
  int64_t head = base + (V - base % V) % V;
  if (head > end) head = end;
  const int64_t tail = end - (end - head) % V;
  const auto one = [&](int64_t i) { use(single, i, read(single, i)); };
  for (int64_t i = base + lane; i < head; i += kGroup) one(i);
  walk<1>(
      head + lane * V, tail, kGroup * V, [&](int64_t i) { return read(packed, i); },
      [&](int64_t i, const auto& found) { use(packed, i, found); });
  for (int64_t i = tail + lane; i < end; i += kGroup) one(i);
}

// The bits of this thread's group, of at most a warp.
template <int kGroup>
__device__ __forceinline__ unsigned int lanes() {
  static_assert(kGroup <= kWarp);
  return (0xffffffffu >> (kWarp - kGroup)) << (threadIdx.x % kWarp / kGroup * kGroup);
}

// The sum over a group of at most a warp, which its first thread then has. Every thread of the group calls it.
template <int kGroup>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(lanes<kGroup>(), value, offset, kGroup);
  }
  return value;
}

// Sums over the threads of a group, which lane 0 then has. Every thread of the group calls it.
template <int kGroup, int kSums>
__device__ __forceinline__ void group_sums(int lane, float* sums) {
#pragma unroll
  for (int j = 0; j < kSums; ++j) sums[j] = lanes_sum<(kGroup < kWarp ? kGroup : kWarp)>(sums[j]);
  if constexpr (kGroup > kWarp) {
    __shared__ float shared[kSums][kGroup / kWarp];
    if (lane % kWarp == 0) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) shared[j][lane / kWarp] = sums[j];
    }
    __syncthreads();
    if (lane == 0) {
      for (int w = 1; w < kGroup / kWarp; ++w) {
#pragma unroll
        for (int j = 0; j < kSums; ++j) sums[j] += shared[j][w];
      }
    }
  }
}

// launch(a constant, blocks): how many threads take a plane of s numbers, kPart, kWarp or kThreads.
template <class Launch>
void with_group(int64_t planes, int64_t s, Launch launch) {
  const auto blocks = [&](int group) { return static_cast<unsigned int>(ceil_div(planes, kThreads / group)); };
  if (s <= kPartPlane) {
    launch(std::integral_constant<int, kPart>{}, blocks(kPart));
  } else if (s <= kWarpPlane) {
    launch(std::integral_constant<int, kWarp>{}, blocks(kWarp));
  } else {
    launch(std::integral_constant<int, kThreads>{}, blocks(kThreads));
  }
}

template <class Op, int V, int kGroup>
__global__ void __launch_bounds__(kThreads, 4)
    sums_of_planes(Op op, int64_t planes, int64_t channels, int64_t s, Sums<Op::kSums> out) {
  const int lane = threadIdx.x % kGroup;
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  // A group leaves as a whole: a warp's shuffles and, where the group is the block, its barriers see every thread.
  if (plane >= planes) return;
  const auto coefficients = op.channel(plane % channels);
  float sums[Op::kSums] = {};
  for_plane<V, kGroup>(
      plane * s, s, lane, [&](auto width, int64_t i) { return op.template read<decltype(width)::value>(i); },
      [&](auto width, int64_t i, const auto& found) {
        op.template write<decltype(width)::value>(
            i, found, [&](int) { return coefficients; }, [&](int) { return sums; });
      });
  group_sums<kGroup, Op::kSums>(lane, sums);
  if (lane == 0) {
#pragma unroll
    for (int j = 0; j < Op::kSums; ++j) out.to[j][plane] = sums[j];
  }
}

// --- Sums of columns: a block takes blockDim.x * V channels of one chunk of rows
// Rows of a chunk follow from the sizes alone: whoever allocates the scratch memory does not know the width of an
// access.
inline int64_t chunk_rows(int64_t n, int64_t c, int64_t s) {
  const int64_t packs = ceil_div(c, kSumsPack);
  const dim3 block = columns_block(packs);
  const int64_t down = block.y, tiles = ceil_div(packs, block.x);
  int64_t each = kSumRows;
  while (each > 4 && n * ceil_div(s, each * down) * tiles < kBlocks) each /= 2;
  // Chunks of the same size.
  return ceil_div(ceil_div(s, ceil_div(s, each * down)), down) * down;
}

// Sums of each of the block's columns, which begin at channel `tile`, to out + channel. Every thread calls it.
template <int V, int kSums>
__device__ __forceinline__ void column_sums(const float (&sums)[V][kSums], int64_t tile, int64_t channels,
                                            int64_t start, const Sums<kSums>& out) {
  __shared__ float shared[kSums][kThreads * V];
  const int width = blockDim.x * V;
#pragma unroll
  for (int i = 0; i < V; ++i) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) shared[j][threadIdx.y * width + threadIdx.x * V + i] = sums[i][j];
  }
  __syncthreads();
  for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += kThreads) {
    if (tile + column >= channels) continue;
    float total[kSums] = {};
    for (int row = 0; row < blockDim.y; ++row) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) total[j] += shared[j][row * width + column];
    }
#pragma unroll
    for (int j = 0; j < kSums; ++j) out.to[j][start + tile + column] = total[j];
  }
}

template <class Op, int V>
__global__ void __launch_bounds__(kThreads)
    sums_of_columns(Op op, int64_t channels, int64_t s, int64_t chunk_rows, int64_t chunks, Sums<Op::kSums> out) {
  const int64_t sample = blockIdx.x / chunks;
  const int64_t chunk = blockIdx.x - sample * chunks;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * blockDim.x * V;
  const int64_t c = tile + threadIdx.x * V;
  float sums[V][Op::kSums] = {};
  if (c < channels) {
    decltype(op.channel(c)) coefficients[V];
#pragma unroll
    for (int i = 0; i < V; ++i) coefficients[i] = op.channel(c + i);
    const int64_t first = chunk * chunk_rows;
    const int64_t end = first + chunk_rows < s ? first + chunk_rows : s;
    walk<Op::kInFlight>((sample * s + first + threadIdx.y) * channels + c, (sample * s + end) * channels,
                        blockDim.y * channels, [&](int64_t i) { return op.template read<V>(i); },
                        [&](int64_t i, const auto& found) {
                          op.template write<V>(
                              i, found, [&](int k) { return coefficients[k]; }, [&](int k) { return sums[k]; });
                        });
  }
  column_sums<V, Op::kSums>(sums, tile, channels, static_cast<int64_t>(blockIdx.x) * channels, out);
}

// Adds up the chunks of each sample: a warp takes neighbouring channels, every warp of the block a part of the chunks.
// One thread for all chunks of a channel took 18 us of the 124 of a backward of 103 MB maps on an H100.
template <int kSums>
__global__ void __launch_bounds__(kThreads)
    add_chunks(Sums<kSums> parts, Sums<kSums> out, int64_t total, int64_t c, int64_t chunks) {
  constexpr int kWarps = kThreads / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sums[kSums] = {};
  if (i < total) {
    const int64_t first = i / c * chunks * c + i % c;
#pragma unroll 4
    for (int64_t k = warp; k < chunks; k += kWarps) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) sums[j] += parts.to[j][first + k * c];
    }
  }
  __shared__ float shared[kSums][kWarps][kWarp];
#pragma unroll
  for (int j = 0; j < kSums; ++j) shared[j][warp][lane] = sums[j];
  __syncthreads();
  if (warp > 0 || i >= total) return;
#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    for (int other = 1; other < kWarps; ++other) sums[j] += shared[j][other][lane];
    out.to[j][i] = sums[j];
  }
}

// Numbers of scratch memory that launch_sums needs.
inline int64_t sums_partial(int64_t n, int64_t c, int64_t s, bool channels_last, int sums) {
  const int64_t chunks = channels_last ? ceil_div(s, chunk_rows(n, c, s)) : 1;
  return chunks > 1 ? sums * n * chunks * c : 0;
}

// `sizes` and `wide` as for launch_elementwise. out: (n, c) each; partial: sums_partial() numbers.
template <class Op, class Sizes>
int launch_sums(const Op& op, const Sizes& sizes, bool wide, const Sums<Op::kSums>& out, float* partial) {
  const auto stream = static_cast<cudaStream_t>(sizes.stream);
  const int64_t n = sizes.n, c = sizes.c, s = sizes.s;
  const auto planes = [&](auto width) {
    with_group(n * c, s, [&](auto group, unsigned int blocks) {
      sums_of_planes<Op, decltype(width)::value, decltype(group)::value>
          <<<blocks, kThreads, 0, stream>>>(op, n * c, c, s, out);
    });
    return cudaGetLastError();
  };
  const auto columns = [&](auto width) {
    constexpr int kV = decltype(width)::value;
    const int64_t rows = chunk_rows(n, c, s), chunks = ceil_div(s, rows);
    const dim3 block = columns_block(c / kV);
    const dim3 grid(static_cast<unsigned int>(n * chunks), static_cast<unsigned int>(ceil_div(c / kV, block.x)));
    Sums<Op::kSums> parts = out;
    if (chunks > 1) {
      for (int j = 0; j < Op::kSums; ++j) parts.to[j] = partial + j * n * chunks * c;
    }
    sums_of_columns<Op, kV><<<grid, block, 0, stream>>>(op, c, s, rows, chunks, parts);
    if (chunks > 1) {
      const auto blocks = static_cast<unsigned int>(ceil_div(n * c, kWarp));
      add_chunks<<<blocks, kThreads, 0, stream>>>(parts, out, n * c, c, chunks);
    }
    return cudaGetLastError();
  };
  const std::integral_constant<int, 1> singles;
  if (sizes.channels_last) {
    return wide && c % kSumsPack == 0 ? columns(std::integral_constant<int, kSumsPack>{}) : columns(singles);
  }
  return wide ? planes(std::integral_constant<int, kPerAccess<typename Op::Number>>{}) : planes(singles);
}

}  // namespace mnp_fast::cuda
