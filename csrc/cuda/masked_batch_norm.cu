// Bytes moved for each number of x, e bytes wide. Forward: e for the statistics, 2e to normalise (3e with a residual).
// Backward: 2e for the sums (grad, x; with relu and a residual y is read and grad_residual written too), 3e for grad_x
// (grad or grad_residual, x, grad_x). All are bound by memory.
//
// Statistics come from parts of memory, a plane of s numbers or a chunk of rows: each leaves, for each of its channels,
// a number k within the data, the sum of x - k, and that of its square. They are put together in float64.
#include "cuda/loops.cuh"
#include "cuda/masked_batch_norm.h"

namespace mnp_fast::cuda {
namespace {

// Rows of a chunk whose mean is k.
constexpr int64_t kShiftRows = 4;
// A block that adds up items x channels: channels across, items down.
constexpr int kFinishDown = 16;

// What the parts leave: items x channels of each.
struct Partial {
  float *k, *sum, *square;
};

template <class T, int V>
__device__ __forceinline__ void add_pack(const T* x, const float* k, int step, float* sum, float* square) {
  const Pack<T, V> pack = load<T, V>(x);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float difference = widen(pack.v[i]) - k[i * step];
    sum[i * step] += difference;
    square[i * step] = fmaf(difference, difference, square[i * step]);
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
  // Every warp of the group takes the mean of the same numbers.
  const int64_t first = s < kWarp ? s : kWarp;
  const float own = lane % kWarp < first ? widen(x[base + lane % kWarp]) : 0.0f;
  const float k = __shfl_sync(0xffffffffu, warp_sum(own), 0) / static_cast<float>(first);
  float sum = 0.0f, square = 0.0f;
  for_plane<V, kGroup>(
      base, s, lane, [&](auto width, int64_t i) { add_pack<T, decltype(width)::value>(x + i, &k, 0, &sum, &square); });
  group_sums<kGroup>(lane, sum, square);
  if (lane == 0) {
    out.k[plane] = k;
    out.sum[plane] = sum;
    out.square[plane] = square;
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
  float sum[V] = {}, square[V] = {};
  if (c < channels) {
    float k[V] = {};
    const int64_t shift_rows = end - first < kShiftRows ? end - first : kShiftRows;
    for (int64_t row = first; row < first + shift_rows; ++row) {
      const Pack<T, V> pack = load<T, V>(x + row * channels + c);
#pragma unroll
      for (int i = 0; i < V; ++i) k[i] += widen(pack.v[i]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      k[i] /= static_cast<float>(shift_rows);
      if (threadIdx.y == 0) out.k[start + c + i] = k[i];
    }
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
      add_pack<T, V>(x + row * channels + c, k, 1, sum, square);
    }
  }
  column_sums<V>(sum, square, tile, channels, out.sum + start, out.square + start);
}

// The sum down a block of kWarp x kFinishDown, which every thread of a column gets.
__device__ __forceinline__ double column_total(double value) {
  __shared__ double sums[kFinishDown][kWarp];
  sums[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < kFinishDown; ++i) total += sums[i][threadIdx.x];
  // The next call writes there.
  __syncthreads();
  return total;
}

// An item has `item_values` values of a channel, the last one what is left of `values`.
__global__ void __launch_bounds__(kWarp* kFinishDown)
    finish_statistics(MnpBatchNormStatistics p, Partial partial, int64_t items, int64_t item_values, int64_t values) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const bool here = c < p.affine.c;
  const auto count = [&](int64_t item) {
    const int64_t left = values - item * item_values;
    return static_cast<double>(left < item_values ? left : item_values);
  };
  double total = 0.0;
  for (int64_t item = threadIdx.y; here && item < items; item += kFinishDown) {
    const int64_t i = item * p.affine.c + c;
    total += count(item) * partial.k[i] + partial.sum[i];
  }
  const double mean = column_total(total) / static_cast<double>(values);
  total = 0.0;
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

__global__ void __launch_bounds__(kWarp* kFinishDown) finish_sums(MnpBatchNormGradX p, int64_t values) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
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
  MnpAffine affine;
  const T *grad, *x, *y;
  T* grad_x;
  const float *slope, *offset;

  __device__ GradXChannel channel(int64_t c) const {
    const AffineChannel forward = affine_channel(affine, c);
    return {forward.a, forward.b, affine.center[c], slope[c], offset[c]};
  }

  template <int V, class At>
  __device__ __forceinline__ void pack(int64_t i, At at) const {
    const Pack<T, V> gradient = load<T, V>(grad + i), values = load<T, V>(x + i);
    Pack<T, V> signs{}, out;
    if (affine.relu && y != nullptr) signs = load<T, V>(y + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const GradXChannel channel = at(k);
      const float value = widen(values.v[k]);
      float g = widen(gradient.v[k]);
      if (affine.relu) {
        const float sign = y != nullptr ? widen(signs.v[k]) : fmaf(channel.a, value, channel.b);
        if (sign <= 0.0f) g = 0.0f;
      }
      out.v[k] = narrow<T>(fmaf(channel.a, g, fmaf(channel.slope, value - channel.center, channel.offset)));
    }
    store<T, V>(grad_x + i, out);
  }
};

int64_t items_of(int64_t n, int64_t c, int64_t s, bool channels_last) {
  return channels_last ? ceil_div(n * s, chunk_rows(c)) : n;
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
    sums_columns<T, V><<<grid, block, 0, stream>>>(x, n * s, c, chunk_rows(c), partial);
  } else if (s <= kWarpPlane) {
    const auto blocks = static_cast<unsigned int>(ceil_div(n * c, kThreads / kWarp));
    sums_planes<T, V, kWarp><<<blocks, kThreads, 0, stream>>>(x, n * c, s, partial);
  } else {
    sums_planes<T, V, kThreads><<<static_cast<unsigned int>(n * c), kThreads, 0, stream>>>(x, n * c, s, partial);
  }
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return launched;
  const int64_t item_values = p.affine.channels_last ? chunk_rows(c) : s;
  const auto blocks = static_cast<unsigned int>(ceil_div(c, kWarp));
  finish_statistics<<<blocks, dim3(kWarp, kFinishDown), 0, stream>>>(p, partial, items, item_values, n * s);
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
                    static_cast<const T*>(p.y),
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
  const DeviceScope scope(p->affine.device);
  if (scope.status() != cudaSuccess) return scope.status();
  switch (p->affine.dtype) {
    case kMnpFloat32:
      return statistics_typed<float>(*p);
    case kMnpBFloat16:
      return statistics_typed<__nv_bfloat16>(*p);
    case kMnpFloat16:
      return statistics_typed<__half>(*p);
  }
  return cudaErrorInvalidValue;
}

int mnp_masked_batch_norm_grad_x(const MnpBatchNormGradX* p) {
  using namespace mnp_fast::cuda;
  const DeviceScope scope(p->affine.device);
  if (scope.status() != cudaSuccess) return scope.status();
  const auto stream = static_cast<cudaStream_t>(p->affine.stream);
  const auto blocks = static_cast<unsigned int>(ceil_div(p->affine.c, kWarp));
  finish_sums<<<blocks, dim3(kWarp, kFinishDown), 0, stream>>>(*p, p->affine.n * p->affine.s);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess || p->grad_x == nullptr) return launched;
  switch (p->affine.dtype) {
    case kMnpFloat32:
      return grad_x_typed<float>(*p);
    case kMnpBFloat16:
      return grad_x_typed<__nv_bfloat16>(*p);
    case kMnpFloat16:
      return grad_x_typed<__half>(*p);
  }
  return cudaErrorInvalidValue;
}

int64_t mnp_masked_batch_norm_partial(int64_t n, int64_t c, int64_t s, bool channels_last) {
  return 3 * mnp_fast::cuda::items_of(n, c, s, channels_last) * c;
}
}
