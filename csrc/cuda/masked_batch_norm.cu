// Bytes moved for each number of x, e bytes wide. Forward: e for the statistics, 2e to normalise (3e with a residual).
// Backward: 2e for the sums (grad, x; with relu and a residual y is read and grad_residual written too), 3e for grad_x
// (grad or grad_residual, x, grad_x). All are bound by memory.
//
// Statistics come from parts of memory, a plane of s numbers or a chunk of rows: each leaves, for each of its channels,
// a number k within the data, the sum of x - k, and that of its square. They are put together in float64.
#include "cuda/affine.cuh"
#include "cuda/masked_batch_norm.h"

namespace mnp_fast::cuda {
namespace {

// Rows of a chunk whose mean is k.
constexpr int64_t kShiftRows = 4;
// A block that adds up items x channels: channels across, items down. Few channels, or too few blocks are at work.
constexpr int kFinishAcross = 4, kFinishDown = 128;
// Blocks of the statistics: two for each multiprocessor of an H100, and no more to add up.
constexpr int64_t kStatisticsBlocks = 264;

// What the parts leave: items x channels of each.
struct Partial {
  float *k, *sum, *square;
};

// sums: those of x - k and of its square, number i at [i * step].
template <int V, class T>
__device__ __forceinline__ void add_pack(const Pack<T, V>& x, const float* k, int step, float (*sums)[2]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float difference = widen(x.v[i]) - k[i * step];
    sums[i * step][0] += difference;
    sums[i * step][1] = fmaf(difference, difference, sums[i * step][1]);
  }
}

// Channels outside: a group of threads takes a plane.
template <class T, int V, int kGroup>
__global__ void __launch_bounds__(kThreads) sums_planes(const T* x, int64_t planes, int64_t s, Partial out) {
  const int lane = threadIdx.x % kGroup;
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  // A group leaves as a whole: a warp's shuffles and, where the group is the block, its barriers see every thread.
  if (plane >= planes) return;
  const int64_t base = plane * s;
  constexpr int kLanes = kGroup < kWarp ? kGroup : kWarp;
  // Every warp of the group takes the mean of the same numbers.
  const int64_t first = s < kLanes ? s : kLanes;
  const float own = lane % kLanes < first ? widen(x[base + lane % kLanes]) : 0.0f;
  const float total = lanes_sum<kLanes>(own);
  const float k = __shfl_sync(lanes<kLanes>(), total, 0, kLanes) / static_cast<float>(first);
  float sums[1][2] = {};
  for_plane<V, kGroup>(
      base, s, lane, [&](auto width, int64_t i) { return load<T, decltype(width)::value>(x + i); },
      [&](auto width, int64_t, const auto& found) { add_pack<decltype(width)::value>(found, &k, 0, sums); });
  group_sums<kGroup, 2>(lane, sums[0]);
  if (lane == 0) {
    out.k[plane] = k;
    out.sum[plane] = sums[0][0];
    out.square[plane] = sums[0][1];
  }
}

// Channels inside: a block takes blockDim.x * V channels of one chunk of rows.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sums_columns(const T* x, int64_t rows, int64_t channels, int64_t chunk_rows, Partial out) {
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * blockDim.x * V;
  const int64_t c = tile + threadIdx.x * V;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk_rows;
  const int64_t end = first + chunk_rows < rows ? first + chunk_rows : rows;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * channels;
  float sums[V][2] = {};
  if (c < channels) {
    float k[V] = {};
    const int64_t shift_rows = end - first < kShiftRows ? end - first : kShiftRows;
#pragma unroll
    for (int64_t row = 0; row < kShiftRows; ++row) {
      if (row >= shift_rows) break;
      const Pack<T, V> pack = load<T, V>(x + (first + row) * channels + c);
#pragma unroll
      for (int i = 0; i < V; ++i) k[i] += widen(pack.v[i]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      k[i] /= static_cast<float>(shift_rows);
      if (threadIdx.y == 0) out.k[start + c + i] = k[i];
    }
    walk<8>((first + threadIdx.y) * channels + c, end * channels, blockDim.y * channels,
            [&](int64_t i) { return load<T, V>(x + i); },
            [&](int64_t, const Pack<T, V>& found) { add_pack<V>(found, k, 1, sums); });
  }
  column_sums<V, 2>(sums, tile, channels, start, {out.sum, out.square});
}

// The sum down a block of kFinishAcross x kFinishDown, which every thread of a column gets.
__device__ __forceinline__ double column_total(double value) {
  __shared__ double sums[kFinishDown][kFinishAcross];
  sums[threadIdx.y][threadIdx.x] = value;
#pragma unroll
  for (int half = kFinishDown / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + half][threadIdx.x];
  }
  __syncthreads();
  const double total = sums[0][threadIdx.x];
  // The next call writes there.
  __syncthreads();
  return total;
}

// An item has `item_values` values of a channel, the last one what is left of `values`.
__global__ void __launch_bounds__(kFinishAcross* kFinishDown)
    finish_statistics(MnpBatchNormStatistics p, Partial partial, int64_t items, int64_t item_values, int64_t values) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishAcross + threadIdx.x;
  const bool here = c < p.affine.c;
  const auto count = [&](int64_t item) {
    const int64_t left = values - item * item_values;
    return static_cast<double>(left < item_values ? left : item_values);
  };
  double total = 0.0;
#pragma unroll 4
  for (int64_t item = threadIdx.y; here && item < items; item += kFinishDown) {
    const int64_t i = item * p.affine.c + c;
    total += count(item) * partial.k[i] + partial.sum[i];
  }
  const double mean = column_total(total) / static_cast<double>(values);
  total = 0.0;
#pragma unroll 4
  for (int64_t item = threadIdx.y; here && item < items; item += kFinishDown) {
    const int64_t i = item * p.affine.c + c;
    // The sum of (x - mean)^2 from those of x - k and (x - k)^2.
    const double apart = partial.k[i] - mean;
    total += partial.square[i] + apart * (2.0 * partial.sum[i] + count(item) * apart);
  }
  double variance = column_total(total) / static_cast<double>(values);
  // Written so that NaN stays NaN.
  if (variance < 0.0) variance = 0.0;
  if (here && threadIdx.y == 0) {
    const float rstd = static_cast<float>(1.0 / sqrt(variance + p.eps));
    p.mean[c] = static_cast<float>(mean);
    p.rstd[c] = rstd;
    p.scale[c] = p.weight[c] * rstd;
  }
}

__global__ void __launch_bounds__(kFinishAcross* kFinishDown) finish_sums(MnpBatchNormGradX p, int64_t values) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishAcross + threadIdx.x;
  const bool here = c < p.affine.c;
  const float rstd = here ? p.rstd[c] : 0.0f;
  double g = 0.0, gx = 0.0;
  for (int64_t sample = threadIdx.y; here && sample < p.affine.n; sample += kFinishDown) {
    const int64_t i = sample * p.affine.c + c;
    const float product = p.sum_gx[i] * rstd;
    p.sum_gx[i] = product;
    g += p.sum_g[i];
    gx += product;
  }
  g = column_total(g);
  gx = column_total(gx);
  if (here && threadIdx.y == 0 && p.grad_x != nullptr) {
    const double a = p.affine.mask[c] * p.affine.scale[c];
    p.slope[c] = static_cast<float>(-a * rstd * gx / static_cast<double>(values));
    p.offset[c] = static_cast<float>(-a * g / static_cast<double>(values));
  }
}

struct GradXChannel {
  float a, b, center, slope, offset;
};

template <class T>
struct GradX {
  using Number = T;
  static constexpr int kInFlight = 1;
  MnpAffine affine;
  const T *grad, *x, *y;
  T* grad_x;
  const float *slope, *offset;

  __device__ GradXChannel channel(int64_t c) const {
    const AffineChannel forward = affine_channel(affine, c);
    return {forward.a, forward.b, affine.center[c], slope[c], offset[c]};
  }

  template <int V>
  struct Read {
    Pack<T, V> grad, x, y;
  };

  template <int V>
  __device__ __forceinline__ Read<V> read(int64_t i) const {
    Read<V> found{load<T, V>(grad + i), load<T, V>(x + i), {}};
    if (y != nullptr) found.y = load<T, V>(y + i);
    return found;
  }

  template <int V, class At>
  __device__ __forceinline__ void write(int64_t i, const Read<V>& found, At at) const {
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const GradXChannel channel = at(k);
      const float value = widen(found.x.v[k]);
      float g = widen(found.grad.v[k]);
      if (affine.relu) {
        const float sign = y != nullptr ? widen(found.y.v[k]) : fmaf(channel.a, value, channel.b);
        if (sign <= 0.0f) g = 0.0f;
      }
      out.v[k] = narrow<T>(fmaf(channel.a, g, fmaf(channel.slope, value - channel.center, channel.offset)));
    }
    store<T, V>(grad_x + i, out);
  }
};

// Rows of a chunk.
int64_t statistics_rows(int64_t c, int64_t rows) {
  const int64_t packs = ceil_div(c, 8);
  const dim3 block = columns_block(packs);
  const int64_t each = ceil_div(rows, ceil_div(kStatisticsBlocks, ceil_div(packs, block.x)));
  const int64_t least = int64_t{4} * block.y;
  return each > least ? each : least;
}

int64_t items_of(int64_t n, int64_t c, int64_t s, bool channels_last) {
  return channels_last ? ceil_div(n * s, statistics_rows(c, n * s)) : n;
}

template <class T, int V>
int statistics_wide(const MnpBatchNormStatistics& p) {
  const auto stream = static_cast<cudaStream_t>(p.affine.stream);
  const T* x = static_cast<const T*>(p.x);
  const int64_t n = p.affine.n, c = p.affine.c, s = p.affine.s;
  const int64_t items = items_of(n, c, s, p.affine.channels_last);
  const Partial partial{p.partial, p.partial + items * c, p.partial + 2 * items * c};
  if (p.affine.channels_last) {
    const int64_t packs = c / V;
    const dim3 block = columns_block(packs);
    const dim3 grid(static_cast<unsigned int>(items), static_cast<unsigned int>(ceil_div(packs, block.x)));
    sums_columns<T, V><<<grid, block, 0, stream>>>(x, n * s, c, statistics_rows(c, n * s), partial);
  } else {
    with_group(n * c, s, [&](auto group, unsigned int blocks) {
      sums_planes<T, V, decltype(group)::value><<<blocks, kThreads, 0, stream>>>(x, n * c, s, partial);
    });
  }
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return launched;
  const int64_t item_values = p.affine.channels_last ? statistics_rows(c, n * s) : s;
  const auto blocks = static_cast<unsigned int>(ceil_div(c, kFinishAcross));
  finish_statistics<<<blocks, dim3(kFinishAcross, kFinishDown), 0, stream>>>(p, partial, items, item_values, n * s);
  return cudaGetLastError();
}

template <class T>
int statistics_typed(const MnpBatchNormStatistics& p) {
  constexpr int kV = kPerAccess<T>;
  const bool wide = aligned(p.x) && (!p.affine.channels_last || p.affine.c % kV == 0);
  return wide ? statistics_wide<T, kV>(p) : statistics_wide<T, 1>(p);
}

template <class T>
int grad_x_typed(const MnpBatchNormGradX& p) {
  const GradX<T> op{p.affine,
                    static_cast<const T*>(p.grad),
                    static_cast<const T*>(p.x),
                    p.affine.relu ? static_cast<const T*>(p.y) : nullptr,
                    static_cast<T*>(p.grad_x),
                    p.slope,
                    p.offset};
  return launch_elementwise(op, p.affine, aligned(p.grad) && aligned(p.x) && aligned(p.y) && aligned(p.grad_x));
}

}  // namespace
}  // namespace mnp_fast::cuda

extern "C" {

int mnp_masked_batch_norm_statistics(const MnpBatchNormStatistics* p) {
  using namespace mnp_fast::cuda;
  return typed(p->affine, [&](auto number) { return statistics_typed<decltype(number)>(*p); });
}

int mnp_masked_batch_norm_grad_x(const MnpBatchNormGradX* p) {
  using namespace mnp_fast::cuda;
  return typed(p->affine, [&](auto number) -> int {
    const auto blocks = static_cast<unsigned int>(ceil_div(p->affine.c, kFinishAcross));
    finish_sums<<<blocks, dim3(kFinishAcross, kFinishDown), 0, static_cast<cudaStream_t>(p->affine.stream)>>>(
        *p, p->affine.n * p->affine.s);
    const cudaError_t launched = cudaGetLastError();
    return launched != cudaSuccess || p->grad_x == nullptr ? launched : grad_x_typed<decltype(number)>(*p);
  });
}

int64_t mnp_masked_batch_norm_partial(int64_t n, int64_t c, int64_t s, bool channels_last) {
  return 3 * mnp_fast::cuda::items_of(n, c, s, channels_last) * c;
}
}
