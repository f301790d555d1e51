// Bytes moved for each number of x, e bytes wide: forward 2e (3e with a residual); backward 3e (grad, x, grad_x), e
// more each for y and grad_residual; the sums add 8 bytes for each sample and channel. All are bound by memory: on a
// device with bandwidth B, (n, c, s) takes n*c*s*2e / B at least.
#include "cuda/affine.cuh"

namespace mnp_fast::cuda {
namespace {

template <class T>
struct Forward {
  using Number = T;
  static constexpr int kInFlight = 4;
  MnpAffine affine;
  const T *x, *residual;
  T* y;

  template <int V>
  struct Read {
    Pack<T, V> x, residual;
  };

  __device__ AffineChannel channel(int64_t c) const { return affine_channel(affine, c); }

  template <int V>
  __device__ __forceinline__ Read<V> read(int64_t i) const {
    Read<V> found{load<T, V>(x + i), {}};
    if (residual != nullptr) found.residual = load<T, V>(residual + i);
    return found;
  }

  template <int V, class At>
  __device__ __forceinline__ void write(int64_t i, const Read<V>& found, At at) const {
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const AffineChannel channel = at(k);
      float value = fmaf(channel.a, widen(found.x.v[k]), channel.b);
      if (residual != nullptr) value += widen(found.residual.v[k]);
      // Written so that NaN stays NaN.
      if (affine.relu) value = value < 0.0f ? 0.0f : value;
      out.v[k] = narrow<T>(value);
    }
    store<T, V>(y + i, out);
  }
};

// Sums: those of g and of g*(x - center), g the gradient behind the activation. kSigned: the sign comes from y.
template <class T, bool kSigned>
struct Backward {
  using Number = T;
  static constexpr int kSums = 2;
  static constexpr int kInFlight = 4;
  MnpAffine affine;
  const T *grad, *x, *y;  // y: read if kSigned
  T *grad_x, *grad_residual;

  struct Channel {
    AffineChannel affine;
    float center;
  };
  template <int V>
  struct Read {
    Pack<T, V> grad, x, y;
  };

  __device__ Channel channel(int64_t c) const { return {affine_channel(affine, c), affine.center[c]}; }

  template <int V>
  __device__ __forceinline__ Read<V> read(int64_t i) const {
    Read<V> found;
    found.grad = load<T, V>(grad + i);
    found.x = load<T, V>(x + i);
    if constexpr (kSigned) found.y = load<T, V>(y + i);
    return found;
  }

  template <int V, class At, class Sum>
  __device__ __forceinline__ void write(int64_t i, const Read<V>& found, At at, Sum sums) const {
    Pack<T, V> out, behind;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Channel channel = at(k);
      const float value = widen(found.x.v[k]);
      float g = widen(found.grad.v[k]);
      if (affine.relu) {
        const float sign = kSigned ? widen(found.y.v[k]) : fmaf(channel.affine.a, value, channel.affine.b);
        if (sign <= 0.0f) g = 0.0f;
      }
      out.v[k] = narrow<T>(channel.affine.a * g);
      behind.v[k] = narrow<T>(g);
      float* sum = sums(k);
      sum[0] += g;
      sum[1] = fmaf(g, value - channel.center, sum[1]);
    }
    if (grad_x != nullptr) store<T, V>(grad_x + i, out);
    if (grad_residual != nullptr) store<T, V>(grad_residual + i, behind);
  }
};

template <class T>
int forward_typed(const MnpAffineForward& p) {
  const Forward<T> op{p.affine, static_cast<const T*>(p.x), static_cast<const T*>(p.residual), static_cast<T*>(p.y)};
  return launch_elementwise(op, p.affine, aligned(p.x) && aligned(p.residual) && aligned(p.y));
}

template <class T, bool kSigned>
int launch_backward(const MnpAffineBackward& p) {
  const Backward<T, kSigned> op{p.affine,
                                static_cast<const T*>(p.grad),
                                static_cast<const T*>(p.x),
                                static_cast<const T*>(p.y),
                                static_cast<T*>(p.grad_x),
                                static_cast<T*>(p.grad_residual)};
  const bool wide = aligned(p.grad) && aligned(p.x) && aligned(p.y) && aligned(p.grad_x) && aligned(p.grad_residual);
  return launch_sums(op, p.affine, wide, {p.sum_g, p.sum_gx}, p.partial);
}

template <class T>
int backward_typed(const MnpAffineBackward& p) {
  return p.affine.relu && p.y != nullptr ? launch_backward<T, true>(p) : launch_backward<T, false>(p);
}

}  // namespace
}  // namespace mnp_fast::cuda

extern "C" {

int mnp_masked_affine_forward(const MnpAffineForward* p) {
  using namespace mnp_fast::cuda;
  return typed(p->affine, [&](auto number) { return forward_typed<decltype(number)>(*p); });
}

int mnp_masked_affine_backward(const MnpAffineBackward* p) {
  using namespace mnp_fast::cuda;
  return typed(p->affine, [&](auto number) { return backward_typed<decltype(number)>(*p); });
}

int64_t mnp_masked_affine_partial(int64_t n, int64_t c, int64_t s, bool channels_last) {
  return mnp_fast::cuda::sums_partial(n, c, s, channels_last, 2);
}

int mnp_masked_affine_check(int32_t device) {
  using namespace mnp_fast::cuda;
  const DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return scope.status();
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, sums_of_columns<Backward<float, false>, 1>);
}

const char* mnp_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
