// Bytes moved for each number of x, e bytes wide: forward 2e (3e with a residual); backward 3e (grad, x, grad_x), e
// more each for y and grad_residual; the sums add 8 bytes for each sample and channel. All are bound by memory: on a
// device with bandwidth B, (n, c, s) takes n*c*s*2e / B at least.
//
// Channels outside, (n, c, s): forward goes through memory in a line; backward gives each plane of s numbers to a group
// of threads, which keeps its two sums. Channels inside, (n, s, c): a thread keeps the coefficients, and in the
// backward the sums, of the channels that it owns and walks down the rows. One access is 16 bytes wherever addresses
// allow it.
#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/masked_affine.h"

namespace mnp_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 16;
// Planes no longer than this are summed by a warp each, longer ones by a block each.
constexpr int64_t kWarpPlane = 1024;

struct Channel {
  float a, b;
};

__device__ __forceinline__ Channel channel(const MnpAffine& p, int64_t c) {
  const float a = p.mask[c] * p.scale[c];
  return {a, fmaf(-a, p.center[c], p.shift[c])};
}

template <class T>
__device__ __forceinline__ T forward_one(T x, const T* residual, Channel channel, bool relu) {
  float y = fmaf(channel.a, widen(x), channel.b);
  if (residual != nullptr) y += widen(*residual);
  // Written so that NaN stays NaN.
  if (relu) y = y < 0.0f ? 0.0f : y;
  return narrow<T>(y);
}

// --- Forward, memory in a line: every thread takes V numbers in a row, of one channel each `s` numbers
// ----------------
template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads) forward_line(MnpAffineForward p, Index s, Index total) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  const Index channels = static_cast<Index>(p.affine.c);
  const bool one_channel = s % V == 0;
  const Index start = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (start >= total) return;
  const Index plane = start / s;
  Index offset = start - plane * s;
  Index c = plane % channels;
  Channel coefficients = channel(p.affine, c);
  // The next number's channel; asked only where a pack may reach into another plane.
  const auto advance = [&] {
    if (++offset == s) {
      offset = 0;
      if (++c == channels) c = 0;
      coefficients = channel(p.affine, c);
    }
  };
  if (total - start >= V) {
    const Pack<T, V> in = load<T, V>(x + start);
    Pack<T, V> added{};
    if (residual != nullptr) added = load<T, V>(residual + start);
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out.v[i] = forward_one(in.v[i], residual != nullptr ? &added.v[i] : nullptr, coefficients, p.affine.relu);
      if (!one_channel && i + 1 < V) advance();
    }
    store<T, V>(y + start, out);
  } else {
    for (Index i = start; i < total; ++i) {
      y[i] = forward_one(x[i], residual != nullptr ? residual + i : nullptr, coefficients, p.affine.relu);
      if (i + 1 < total) advance();
    }
  }
}

// --- Forward, channels inside: a thread owns V channels of kRowsPerThread rows; V divides the channels
// -----------------
template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward_columns(MnpAffineForward p, int64_t rows) {
  const int64_t channels = p.affine.c;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= channels) return;
  const T* x = static_cast<const T*>(p.x) + c;
  const T* residual = p.residual != nullptr ? static_cast<const T*>(p.residual) + c : nullptr;
  T* y = static_cast<T*>(p.y) + c;
  Channel coefficients[V];
#pragma unroll
  for (int i = 0; i < V; ++i) coefficients[i] = channel(p.affine, c + i);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kRowsPerThread + threadIdx.y;
#pragma unroll 4
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int64_t row = first + static_cast<int64_t>(k) * blockDim.y;
    if (row >= rows) break;
    const Pack<T, V> in = load<T, V>(x + row * channels);
    Pack<T, V> added{};
    if (residual != nullptr) added = load<T, V>(residual + row * channels);
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out.v[i] = forward_one(in.v[i], residual != nullptr ? &added.v[i] : nullptr, coefficients[i], p.affine.relu);
    }
    store<T, V>(y + row * channels, out);
  }
}

// --- Backward
// ---------------------------------------------------------------------------------------------------------
template <class T>
struct Streams {
  const T *grad, *x, *y;
  T *grad_x, *grad_residual;
  __device__ explicit Streams(const MnpAffineBackward& p)
      : grad(static_cast<const T*>(p.grad)),
        x(static_cast<const T*>(p.x)),
        y(static_cast<const T*>(p.y)),
        grad_x(static_cast<T*>(p.grad_x)),
        grad_residual(static_cast<T*>(p.grad_residual)) {}
};

// V numbers at offset i, number k of channel[k * kStep]: kStep 0 for one channel, 1 for neighbours.
template <int V, int kStep, class T>
__device__ __forceinline__ void backward_pack(const Streams<T>& t, int64_t i, bool relu, const Channel* channel,
                                              const float* center, float* sum_g, float* sum_gx) {
  const Pack<T, V> grad = load<T, V>(t.grad + i);
  const Pack<T, V> x = load<T, V>(t.x + i);
  Pack<T, V> y{}, grad_x, grad_residual;
  if (relu && t.y != nullptr) y = load<T, V>(t.y + i);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const Channel coefficients = channel[k * kStep];
    const float value = widen(x.v[k]);
    float g = widen(grad.v[k]);
    if (relu) {
      const float sign = t.y != nullptr ? widen(y.v[k]) : fmaf(coefficients.a, value, coefficients.b);
      if (sign <= 0.0f) g = 0.0f;
    }
    grad_x.v[k] = narrow<T>(coefficients.a * g);
    grad_residual.v[k] = narrow<T>(g);
    sum_g[k * kStep] += g;
    sum_gx[k * kStep] = fmaf(g, value - center[k * kStep], sum_gx[k * kStep]);
  }
  if (t.grad_x != nullptr) store<T, V>(t.grad_x + i, grad_x);
  if (t.grad_residual != nullptr) store<T, V>(t.grad_residual + i, grad_residual);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// Channels outside: `kGroup` threads for each plane of s numbers, kGroup a warp or the block. Bases are multiples of 16
// bytes, planes need not be: the numbers before the first whole pack and behind the last are taken one by one.
template <class T, int V, int kGroup>
__global__ void __launch_bounds__(kThreads) backward_planes(MnpAffineBackward p, int64_t planes) {
  constexpr int kGroups = kThreads / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup;
  // A group leaves as a whole: a warp's shuffles and, where the group is the block, its barriers see every thread.
  if (plane >= planes) return;
  const Streams<T> t(p);
  const int64_t c = plane % p.affine.c;
  const Channel coefficients = channel(p.affine, c);
  const float center = p.affine.center[c];
  const int64_t s = p.affine.s;
  const int64_t base = plane * s;
  int64_t head = (V - base % V) % V;
  if (head > s) head = s;
  const int64_t packs = (s - head) / V;
  const int64_t tail = head + packs * V;
  float g = 0.0f, gx = 0.0f;
  for (int64_t i = lane; i < head; i += kGroup) {
    backward_pack<1, 0>(t, base + i, p.affine.relu, &coefficients, &center, &g, &gx);
  }
  for (int64_t i = lane; i < packs; i += kGroup) {
    backward_pack<V, 0>(t, base + head + i * V, p.affine.relu, &coefficients, &center, &g, &gx);
  }
  for (int64_t i = tail + lane; i < s; i += kGroup) {
    backward_pack<1, 0>(t, base + i, p.affine.relu, &coefficients, &center, &g, &gx);
  }
  g = warp_sum(g);
  gx = warp_sum(gx);
  if constexpr (kGroup > kWarp) {
    __shared__ float sums[2][kGroup / kWarp];
    if (lane % kWarp == 0) {
      sums[0][lane / kWarp] = g;
      sums[1][lane / kWarp] = gx;
    }
    __syncthreads();
    if (lane == 0) {
      for (int w = 1; w < kGroup / kWarp; ++w) {
        g += sums[0][w];
        gx += sums[1][w];
      }
    }
  }
  if (lane == 0) {
    p.sum_g[plane] = g;
    p.sum_gx[plane] = gx;
  }
}

// Channels inside: a block takes blockDim.x * V channels of one chunk of a sample's rows, and leaves one sum a channel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_columns(MnpAffineBackward p, int64_t chunk_rows, int64_t chunks, float* out_g, float* out_gx) {
  __shared__ float sums[2][kThreads * V];
  const Streams<T> t(p);
  const int64_t channels = p.affine.c;
  const int64_t sample = blockIdx.x / chunks;
  const int64_t chunk = blockIdx.x - sample * chunks;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * blockDim.x * V;
  const int64_t c = tile + threadIdx.x * V;
  float g[V] = {}, gx[V] = {};
  if (c < channels) {
    Channel coefficients[V];
    float center[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      coefficients[i] = channel(p.affine, c + i);
      center[i] = p.affine.center[c + i];
    }
    const int64_t first = chunk * chunk_rows;
    const int64_t end = first + chunk_rows < p.affine.s ? first + chunk_rows : p.affine.s;
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
      backward_pack<V, 1>(t, (sample * p.affine.s + row) * channels + c, p.affine.relu, coefficients, center, g, gx);
    }
  }
  const int width = blockDim.x * V;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sums[0][threadIdx.y * width + threadIdx.x * V + i] = g[i];
    sums[1][threadIdx.y * width + threadIdx.x * V + i] = gx[i];
  }
  __syncthreads();
  for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += kThreads) {
    if (tile + column >= channels) continue;
    float total_g = 0.0f, total_gx = 0.0f;
    for (int row = 0; row < blockDim.y; ++row) {
      total_g += sums[0][row * width + column];
      total_gx += sums[1][row * width + column];
    }
    const int64_t out = static_cast<int64_t>(blockIdx.x) * channels + tile + column;
    out_g[out] = total_g;
    out_gx[out] = total_gx;
  }
}

// Adds up the chunks of each sample, first to last.
__global__ void __launch_bounds__(kThreads)
    add_chunks(const float* g, const float* gx, float* sum_g, float* sum_gx, int64_t total, int64_t c, int64_t chunks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t first = i / c * chunks * c + i % c;
  float total_g = 0.0f, total_gx = 0.0f;
  for (int64_t k = 0; k < chunks; ++k) {
    total_g += g[first + k * c];
    total_gx += gx[first + k * c];
  }
  sum_g[i] = total_g;
  sum_gx[i] = total_gx;
}

// --- Launches
// --------------------------------------------------------------------------------------------------------- A block of
// kThreads: as many threads across as a row has packs, at most a warp, and the rest down the rows.
dim3 columns_block(int64_t packs) {
  unsigned int across = 1;
  while (across < kWarp && across < packs) across *= 2;
  return dim3(across, kThreads / across);
}

// Rows of a chunk follow from the sizes alone: whoever allocates the scratch memory does not know the width of an
// access.
int64_t chunk_rows(int64_t c) {
  const dim3 block = columns_block(ceil_div(c, 4));
  return static_cast<int64_t>(block.y) * kRowsPerThread;
}

template <class T>
int forward_typed(const MnpAffineForward& p) {
  constexpr int kV = kPerAccess<T>;
  const auto stream = static_cast<cudaStream_t>(p.affine.stream);
  const int64_t total = p.affine.n * p.affine.c * p.affine.s;
  const bool wide = aligned(p.x) && aligned(p.residual) && aligned(p.y);
  if (p.affine.channels_last && wide && p.affine.c % kV == 0) {
    const int64_t rows = p.affine.n * p.affine.s, packs = p.affine.c / kV;
    const dim3 block = columns_block(packs);
    const dim3 grid(static_cast<unsigned int>(ceil_div(rows, static_cast<int64_t>(block.y) * kRowsPerThread)),
                    static_cast<unsigned int>(ceil_div(packs, block.x)));
    forward_columns<T, kV><<<grid, block, 0, stream>>>(p, rows);
    return cudaGetLastError();
  }
  // Channels inside are planes of one number to the kernel that goes through memory in a line.
  const int64_t s = p.affine.channels_last ? 1 : p.affine.s;
  const auto launch = [&](auto width, auto index) {
    using Index = decltype(index);
    constexpr int kWidth = decltype(width)::value;
    const auto blocks = static_cast<unsigned int>(ceil_div(ceil_div(total, kWidth), kThreads));
    forward_line<T, kWidth, Index>
        <<<blocks, kThreads, 0, stream>>>(p, static_cast<Index>(s), static_cast<Index>(total));
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

template <class T, int V>
int backward_wide(const MnpAffineBackward& p) {
  const auto stream = static_cast<cudaStream_t>(p.affine.stream);
  const int64_t n = p.affine.n, c = p.affine.c, s = p.affine.s;
  if (!p.affine.channels_last) {
    const int64_t planes = n * c;
    if (s <= kWarpPlane) {
      const auto blocks = static_cast<unsigned int>(ceil_div(planes, kThreads / kWarp));
      backward_planes<T, V, kWarp><<<blocks, kThreads, 0, stream>>>(p, planes);
    } else {
      backward_planes<T, V, kThreads><<<static_cast<unsigned int>(planes), kThreads, 0, stream>>>(p, planes);
    }
    return cudaGetLastError();
  }
  const int64_t rows = chunk_rows(c), chunks = ceil_div(s, rows), packs = c / V;
  const dim3 block = columns_block(packs);
  const dim3 grid(static_cast<unsigned int>(n * chunks), static_cast<unsigned int>(ceil_div(packs, block.x)));
  const bool parts = chunks > 1;
  float* out_g = parts ? p.partial : p.sum_g;
  float* out_gx = parts ? p.partial + n * chunks * c : p.sum_gx;
  backward_columns<T, V><<<grid, block, 0, stream>>>(p, rows, chunks, out_g, out_gx);
  if (parts) {
    const auto blocks = static_cast<unsigned int>(ceil_div(n * c, kThreads));
    add_chunks<<<blocks, kThreads, 0, stream>>>(out_g, out_gx, p.sum_g, p.sum_gx, n * c, c, chunks);
  }
  return cudaGetLastError();
}

template <class T>
int backward_typed(const MnpAffineBackward& p) {
  constexpr int kV = kPerAccess<T>;
  const bool wide = aligned(p.grad) && aligned(p.x) && aligned(p.y) && aligned(p.grad_x) && aligned(p.grad_residual) &&
                    (!p.affine.channels_last || p.affine.c % kV == 0);
  return wide ? backward_wide<T, kV>(p) : backward_wide<T, 1>(p);
}

}  // namespace
}  // namespace mnp_fast::cuda

extern "C" {

int mnp_masked_affine_forward(const MnpAffineForward* p) {
  using namespace mnp_fast::cuda;
  const DeviceScope scope(p->affine.device);
  if (scope.status() != cudaSuccess) return scope.status();
  switch (p->affine.dtype) {
    case kMnpFloat32:
      return forward_typed<float>(*p);
    case kMnpBFloat16:
      return forward_typed<__nv_bfloat16>(*p);
    case kMnpFloat16:
      return forward_typed<__half>(*p);
  }
  return cudaErrorInvalidValue;
}

int mnp_masked_affine_backward(const MnpAffineBackward* p) {
  using namespace mnp_fast::cuda;
  const DeviceScope scope(p->affine.device);
  if (scope.status() != cudaSuccess) return scope.status();
  switch (p->affine.dtype) {
    case kMnpFloat32:
      return backward_typed<float>(*p);
    case kMnpBFloat16:
      return backward_typed<__nv_bfloat16>(*p);
    case kMnpFloat16:
      return backward_typed<__half>(*p);
  }
  return cudaErrorInvalidValue;
}

int64_t mnp_masked_affine_partial(int64_t n, int64_t c, int64_t s, bool channels_last) {
  using namespace mnp_fast::cuda;
  if (!channels_last) return 0;
  const int64_t chunks = ceil_div(s, chunk_rows(c));
  return chunks > 1 ? 2 * n * chunks * c : 0;
}

int mnp_masked_affine_check(int32_t device) {
  using namespace mnp_fast::cuda;
  const DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return scope.status();
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, backward_columns<float, 1>);
}

const char* mnp_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
