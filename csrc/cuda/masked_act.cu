// Bytes moved for each number of x, e bytes wide: forward 2e, backward 3e (grad, x, grad_x); the sums add 4 bytes for
// each sample and channel. The aim is to be bound by memory: with 2-byte numbers that leaves about 20 instructions a
// number on an A100, 35 on an H100, so exp is ex2 and erf a polynomial of 10 steps.
//
// Threads go through memory as those of masked_affine do.
#include "act.h"
#include "cuda/masked_act.h"
#include "cuda/rows.cuh"

namespace mnp_fast::cuda {
namespace {

struct Value {
  float act, slope;
};

// max(x, 0) - a*Q(a) and its derivative, see act.h. What a caller leaves unused is not computed.
template <Act kAct>
__device__ __forceinline__ Value value_of(float x) {
  // Written so that NaN stays NaN.
  const float positive = x < 0.0f ? 0.0f : x;
  if constexpr (kAct == Act::relu) {
    return {positive, x <= 0.0f ? 0.0f : 1.0f};
  } else {
    const auto at_most = [](float a, float limit) { return a > limit ? limit : a; };
    float a = fabsf(x), q, d;
    if constexpr (kAct == Act::gelu) {
      constexpr float k[] = {MNP_NORMAL_TAIL};
      constexpr int kCount = sizeof(k) / sizeof(k[0]);
      a = at_most(a, kGeluLimit);
      const float e = __expf(-0.5f * a * a);
      float ratio = k[kCount - 1];
#pragma unroll
      for (int i = kCount - 2; i >= 0; --i) ratio = fmaf(ratio, a, k[i]);
      q = e * ratio;
      d = e * 0.398942280f;
    } else {
      float g, steepness;
      if constexpr (kAct == Act::gelu_tanh) {
        constexpr float kScale = 1.59576912f, kCubic = 0.044715f;
        a = at_most(a, kGeluTanhLimit);
        g = a * fmaf(a * a, kScale * kCubic, kScale);
        steepness = fmaf(a * a, 3.0f * kScale * kCubic, kScale);
      } else if constexpr (kAct == Act::silu) {
        g = a = at_most(a, kSiluLimit);
        steepness = 1.0f;
      } else {
        static_assert(kAct == Act::quick_gelu);
        a = at_most(a, kQuickGeluLimit);
        steepness = 1.702f;
        g = steepness * a;
      }
      const float e = __expf(-g);
      q = __fdividef(e, 1.0f + e);
      d = (q - q * q) * steepness;
    }
    return {positive - a * q, 0.5f + copysignf(1.0f, x) * (fmaf(a, d, 0.5f) - q)};
  }
}

// --- Forward
// Channels outside, or inside where accesses cannot be wide: every thread takes V numbers in a row, of one channel each
// `s` numbers.
template <Act kAct, class T, int V, class Index>
__global__ void __launch_bounds__(kThreads) forward_line(MnpActForward p, Index s, Index total) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const Index channels = static_cast<Index>(p.act.c);
  const Index start = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (start >= total) return;
  const bool one_channel = s % V == 0;
  const float first = p.act.mask[start / s % channels];
  const auto result = [&](Index i, T number) {
    const float m = one_channel ? first : p.act.mask[i / s % channels];
    return narrow<T>(m * value_of<kAct>(widen(number)).act);
  };
  if (total - start >= V) {
    const Pack<T, V> in = load<T, V>(x + start);
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.v[i] = result(start + i, in.v[i]);
    store<T, V>(y + start, out);
  } else {
    for (Index i = start; i < total; ++i) y[i] = result(i, x[i]);
  }
}

// Channels inside: a thread owns V channels of kRowsPerThread rows; V divides the channels.
template <Act kAct, class T, int V>
__global__ void __launch_bounds__(kThreads) forward_columns(MnpActForward p, int64_t rows) {
  const int64_t channels = p.act.c;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= channels) return;
  const T* x = static_cast<const T*>(p.x) + c;
  T* y = static_cast<T*>(p.y) + c;
  float mask[V];
#pragma unroll
  for (int i = 0; i < V; ++i) mask[i] = p.act.mask[c + i];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kRowsPerThread + threadIdx.y;
#pragma unroll 4
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int64_t row = first + static_cast<int64_t>(k) * blockDim.y;
    if (row >= rows) break;
    const Pack<T, V> in = load<T, V>(x + row * channels);
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.v[i] = narrow<T>(mask[i] * value_of<kAct>(widen(in.v[i])).act);
    store<T, V>(y + row * channels, out);
  }
}

// --- Backward
template <class T>
struct Streams {
  const T *grad, *x;
  T* grad_x;
  __device__ explicit Streams(const MnpActBackward& p)
      : grad(static_cast<const T*>(p.grad)), x(static_cast<const T*>(p.x)), grad_x(static_cast<T*>(p.grad_x)) {}
};

// V numbers at offset i, number k under mask[k * kStep]: kStep 0 for one channel, 1 for neighbours.
template <Act kAct, int V, int kStep, class T>
__device__ __forceinline__ void backward_pack(const Streams<T>& t, int64_t i, const float* mask, float* sums) {
  const Pack<T, V> grad = load<T, V>(t.grad + i);
  const Pack<T, V> x = load<T, V>(t.x + i);
  Pack<T, V> grad_x;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const float g = widen(grad.v[k]);
    const Value value = value_of<kAct>(widen(x.v[k]));
    grad_x.v[k] = narrow<T>(mask[k * kStep] * (value.slope * g));
    sums[k * kStep] = fmaf(g, value.act, sums[k * kStep]);
  }
  if (t.grad_x != nullptr) store<T, V>(t.grad_x + i, grad_x);
}

// Channels outside: `kGroup` threads for each plane of s numbers, kGroup a warp or the block.
template <Act kAct, class T, int V, int kGroup>
__global__ void __launch_bounds__(kThreads) backward_planes(MnpActBackward p, int64_t planes) {
  const int lane = threadIdx.x % kGroup;
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  // A group leaves as a whole: a warp's shuffles and, where the group is the block, its barrier see every thread.
  if (plane >= planes) return;
  const Streams<T> t(p);
  const float mask = p.act.mask[plane % p.act.c];
  float sum = 0.0f;
  for_plane<V, kGroup>(plane * p.act.s, p.act.s, lane, [&](auto width, int64_t i) {
    backward_pack<kAct, decltype(width)::value, 0>(t, i, &mask, &sum);
  });
  sum = warp_sum(sum);
  if constexpr (kGroup > kWarp) {
    __shared__ float sums[kGroup / kWarp];
    if (lane % kWarp == 0) sums[lane / kWarp] = sum;
    __syncthreads();
    if (lane == 0) {
      for (int w = 1; w < kGroup / kWarp; ++w) sum += sums[w];
    }
  }
  if (lane == 0) p.sum_gact[plane] = sum;
}

// Channels inside: a block takes blockDim.x * V channels of one chunk of a sample's rows, and leaves one sum a channel.
template <Act kAct, class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_columns(MnpActBackward p, int64_t chunk_rows, int64_t chunks, float* out) {
  __shared__ float shared[kThreads * V];
  const Streams<T> t(p);
  const int64_t channels = p.act.c;
  const int64_t sample = blockIdx.x / chunks;
  const int64_t chunk = blockIdx.x - sample * chunks;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * blockDim.x * V;
  const int64_t c = tile + threadIdx.x * V;
  float sums[V] = {};
  if (c < channels) {
    float mask[V];
#pragma unroll
    for (int i = 0; i < V; ++i) mask[i] = p.act.mask[c + i];
    const int64_t first = chunk * chunk_rows;
    const int64_t end = first + chunk_rows < p.act.s ? first + chunk_rows : p.act.s;
#pragma unroll 2
    for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
      backward_pack<kAct, V, 1>(t, (sample * p.act.s + row) * channels + c, mask, sums);
    }
  }
  const int width = blockDim.x * V;
#pragma unroll
  for (int i = 0; i < V; ++i) shared[threadIdx.y * width + threadIdx.x * V + i] = sums[i];
  __syncthreads();
  for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += kThreads) {
    if (tile + column >= channels) continue;
    float total = 0.0f;
    for (int row = 0; row < blockDim.y; ++row) total += shared[row * width + column];
    out[static_cast<int64_t>(blockIdx.x) * channels + tile + column] = total;
  }
}

// --- Launches
template <Act kAct, class T>
int forward_typed(const MnpActForward& p) {
  constexpr int kV = kPerAccess<T>;
  const auto stream = static_cast<cudaStream_t>(p.act.stream);
  const int64_t total = p.act.n * p.act.c * p.act.s;
  const bool wide = aligned(p.x) && aligned(p.y);
  if (p.act.channels_last && wide && p.act.c % kV == 0) {
    const int64_t rows = p.act.n * p.act.s, packs = p.act.c / kV;
    const dim3 block = columns_block(packs);
    const dim3 grid(static_cast<unsigned int>(ceil_div(rows, static_cast<int64_t>(block.y) * kRowsPerThread)),
                    static_cast<unsigned int>(ceil_div(packs, block.x)));
    forward_columns<kAct, T, kV><<<grid, block, 0, stream>>>(p, rows);
    return cudaGetLastError();
  }
  // Channels inside are planes of one number to the kernel that goes through memory in a line.
  const int64_t s = p.act.channels_last ? 1 : p.act.s;
  const auto launch = [&](auto width, auto index) {
    using Index = decltype(index);
    constexpr int kWidth = decltype(width)::value;
    const auto blocks = static_cast<unsigned int>(ceil_div(ceil_div(total, kWidth), kThreads));
    forward_line<kAct, T, kWidth, Index>
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

template <Act kAct, class T, int V>
int backward_wide(const MnpActBackward& p) {
  const auto stream = static_cast<cudaStream_t>(p.act.stream);
  const int64_t n = p.act.n, c = p.act.c, s = p.act.s;
  if (!p.act.channels_last) {
    const int64_t planes = n * c;
    if (s <= kWarpPlane) {
      const auto blocks = static_cast<unsigned int>(ceil_div(planes, kThreads / kWarp));
      backward_planes<kAct, T, V, kWarp><<<blocks, kThreads, 0, stream>>>(p, planes);
    } else {
      backward_planes<kAct, T, V, kThreads><<<static_cast<unsigned int>(planes), kThreads, 0, stream>>>(p, planes);
    }
    return cudaGetLastError();
  }
  const int64_t rows = chunk_rows(c), chunks = ceil_div(s, rows), packs = c / V;
  const dim3 block = columns_block(packs);
  const dim3 grid(static_cast<unsigned int>(n * chunks), static_cast<unsigned int>(ceil_div(packs, block.x)));
  backward_columns<kAct, T, V><<<grid, block, 0, stream>>>(p, rows, chunks, chunks > 1 ? p.partial : p.sum_gact);
  if (chunks > 1) {
    const auto blocks = static_cast<unsigned int>(ceil_div(n * c, kThreads));
    add_chunks<<<blocks, kThreads, 0, stream>>>(p.partial, p.sum_gact, nullptr, n * c, c, chunks);
  }
  return cudaGetLastError();
}

template <Act kAct, class T>
int backward_typed(const MnpActBackward& p) {
  constexpr int kV = kPerAccess<T>;
  const bool wide = aligned(p.grad) && aligned(p.x) && aligned(p.grad_x) && (!p.act.channels_last || p.act.c % kV == 0);
  return wide ? backward_wide<kAct, T, kV>(p) : backward_wide<kAct, T, 1>(p);
}

// run(act, number) with the activation as a constant and a number of the dtype.
template <class Run>
int dispatch(const MnpAct& p, Run run) {
  const DeviceScope scope(p.device);
  if (scope.status() != cudaSuccess) return scope.status();
  const auto typed = [&](auto act) -> int {
    switch (p.dtype) {
      case kMnpFloat32:
        return run(act, float{});
      case kMnpBFloat16:
        return run(act, __nv_bfloat16{});
      case kMnpFloat16:
        return run(act, __half{});
    }
    return cudaErrorInvalidValue;
  };
  switch (static_cast<Act>(p.act)) {
    case Act::gelu:
      return typed(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_tanh:
      return typed(std::integral_constant<Act, Act::gelu_tanh>{});
    case Act::relu:
      return typed(std::integral_constant<Act, Act::relu>{});
    case Act::silu:
      return typed(std::integral_constant<Act, Act::silu>{});
    case Act::quick_gelu:
      return typed(std::integral_constant<Act, Act::quick_gelu>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace mnp_fast::cuda

extern "C" {

int mnp_masked_act_forward(const MnpActForward* p) {
  using namespace mnp_fast::cuda;
  return dispatch(p->act,
                  [&](auto act, auto number) { return forward_typed<decltype(act)::value, decltype(number)>(*p); });
}

int mnp_masked_act_backward(const MnpActBackward* p) {
  using namespace mnp_fast::cuda;
  return dispatch(p->act,
                  [&](auto act, auto number) { return backward_typed<decltype(act)::value, decltype(number)>(*p); });
}

int64_t mnp_masked_act_partial(int64_t n, int64_t c, int64_t s, bool channels_last) {
  return mnp_fast::cuda::partial_sums(n, c, s, channels_last);
}
}
