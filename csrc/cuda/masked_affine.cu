// Bytes moved for each number of x, e bytes wide: forward 2e (3e with a residual); backward 3e (grad, x, grad_x), e
// more each for y and grad_residual; the sums add 8 bytes for each sample and channel. All are bound by memory: on a
// device with bandwidth B, (n, c, s) takes n*c*s*2e / B at least.
//
// Channels outside, (n, c, s): forward goes through memory in a line; backward gives each plane of s numbers to a group
// of threads, which keeps its two sums. Channels inside, (n, s, c): a thread keeps the coefficients, and in the
// backward the sums, of the channels that it owns and walks down the rows. One access is 16 bytes wherever addresses
// allow it.
#include "cuda/loops.cuh"
#include "cuda/masked_affine.h"

namespace mnp_fast::cuda {
namespace {

template <class T>
struct Forward {
  using Number = T;
  MnpAffine affine;
  const T *x, *residual;
  T* y;

  __device__ AffineChannel channel(int64_t c) const { return affine_channel(affine, c); }

  template <int V, class At>
  __device__ __forceinline__ void pack(int64_t i, At at) const {
    const Pack<T, V> in = load<T, V>(x + i);
    Pack<T, V> added{}, out;
    if (residual != nullptr) added = load<T, V>(residual + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const AffineChannel coefficients = at(k);
      float value = fmaf(coefficients.a, widen(in.v[k]), coefficients.b);
      if (residual != nullptr) value += widen(added.v[k]);
      // Written so that NaN stays NaN.
      if (affine.relu) value = value < 0.0f ? 0.0f : value;
      out.v[k] = narrow<T>(value);
    }
    store<T, V>(y + i, out);
  }
};

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
__device__ __forceinline__ void backward_pack(const Streams<T>& t, int64_t i, bool relu, const AffineChannel* channel,
                                              const float* center, float* sum_g, float* sum_gx) {
  const Pack<T, V> grad = load<T, V>(t.grad + i);
  const Pack<T, V> x = load<T, V>(t.x + i);
  Pack<T, V> y{}, grad_x, grad_residual;
  if (relu && t.y != nullptr) y = load<T, V>(t.y + i);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const AffineChannel coefficients = channel[k * kStep];
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

// Channels outside: one sum for each plane.
template <class T, int V, int kGroup>
__global__ void __launch_bounds__(kThreads) backward_planes(MnpAffineBackward p, int64_t planes) {
  constexpr int kGroups = kThreads / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup;
  // A group leaves as a whole: a warp's shuffles and, where the group is the block, its barriers see every thread.
  if (plane >= planes) return;
  const Streams<T> t(p);
  const int64_t c = plane % p.affine.c;
  const AffineChannel coefficients = affine_channel(p.affine, c);
  const float center = p.affine.center[c];
  float g = 0.0f, gx = 0.0f;
  for_plane<V, kGroup>(plane * p.affine.s, p.affine.s, lane, [&](auto width, int64_t i) {
    backward_pack<decltype(width)::value, 0>(t, i, p.affine.relu, &coefficients, &center, &g, &gx);
  });
  group_sums<kGroup>(lane, g, gx);
  if (lane == 0) {
    p.sum_g[plane] = g;
    p.sum_gx[plane] = gx;
  }
}

// Channels inside: a block takes blockDim.x * V channels of one chunk of a sample's rows, and leaves one sum a channel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_columns(MnpAffineBackward p, int64_t chunk_rows, int64_t chunks, float* out_g, float* out_gx) {
  const Streams<T> t(p);
  const int64_t channels = p.affine.c;
  const int64_t sample = blockIdx.x / chunks;
  const int64_t chunk = blockIdx.x - sample * chunks;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * blockDim.x * V;
  const int64_t c = tile + threadIdx.x * V;
  float g[V] = {}, gx[V] = {};
  if (c < channels) {
    AffineChannel coefficients[V];
    float center[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      coefficients[i] = affine_channel(p.affine, c + i);
      center[i] = p.affine.center[c + i];
    }
    const int64_t first = chunk * chunk_rows;
    const int64_t end = first + chunk_rows < p.affine.s ? first + chunk_rows : p.affine.s;
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
      backward_pack<V, 1>(t, (sample * p.affine.s + row) * channels + c, p.affine.relu, coefficients, center, g, gx);
    }
  }
  const int64_t out = static_cast<int64_t>(blockIdx.x) * channels;
  column_sums<V>(g, gx, tile, channels, out_g + out, out_gx + out);
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
// ---------------------------------------------------------------------------------------------------------
template <class T>
int forward_typed(const MnpAffineForward& p) {
  const Forward<T> op{p.affine, static_cast<const T*>(p.x), static_cast<const T*>(p.residual), static_cast<T*>(p.y)};
  return launch_elementwise(op, p.affine, aligned(p.x) && aligned(p.residual) && aligned(p.y));
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
