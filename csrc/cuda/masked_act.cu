// Bytes moved for each number of x, e bytes wide: forward 2e, backward 3e (grad, x, grad_x); the sums add 4 bytes for
// each sample and channel. The aim is to be bound by memory: with 2-byte numbers that leaves about 20 instructions a
// number on an A100, 35 on an H100, so exp is ex2 and erf a polynomial of 10 steps.
#include "act.h"
#include "cuda/loops.cuh"
#include "cuda/masked_act.h"

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

template <Act kAct, class T>
struct Forward {
  using Number = T;
  static constexpr int kInFlight = 4;
  const float* mask;
  const T* x;
  T* y;

  __device__ float channel(int64_t c) const { return mask[c]; }

  template <int V>
  __device__ __forceinline__ Pack<T, V> read(int64_t i) const {
    return load<T, V>(x + i);
  }

  template <int V, class At>
  __device__ __forceinline__ void write(int64_t i, const Pack<T, V>& found, At at) const {
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) out.v[k] = narrow<T>(at(k) * value_of<kAct>(widen(found.v[k])).act);
    store<T, V>(y + i, out);
  }
};

// The sum: that of grad*act(x).
template <Act kAct, class T>
struct Backward {
  using Number = T;
  static constexpr int kSums = 1;
  static constexpr int kInFlight = 2;
  const float* mask;
  const T *grad, *x;
  T* grad_x;

  template <int V>
  struct Read {
    Pack<T, V> grad, x;
  };

  __device__ float channel(int64_t c) const { return mask[c]; }

  template <int V>
  __device__ __forceinline__ Read<V> read(int64_t i) const {
    return {load<T, V>(grad + i), load<T, V>(x + i)};
  }

  template <int V, class At, class Sum>
  __device__ __forceinline__ void write(int64_t i, const Read<V>& found, At at, Sum sums) const {
    Pack<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float g = widen(found.grad.v[k]);
      const Value value = value_of<kAct>(widen(found.x.v[k]));
      // Chosen, not multiplied: behind a closed relu infinity and NaN are zero too, as torch has it.
      const float through = kAct == Act::relu && value.slope == 0.0f ? 0.0f : value.slope * g;
      out.v[k] = narrow<T>(at(k) * through);
      float* sum = sums(k);
      sum[0] = fmaf(g, value.act, sum[0]);
    }
    if (grad_x != nullptr) store<T, V>(grad_x + i, out);
  }
};

// run(act, number) with the activation as a constant and a number of the dtype.
template <class Run>
int dispatch(const MnpAct& p, Run run) {
  const auto with = [&](auto act) { return typed(p, [&](auto number) { return run(act, number); }); };
  switch (static_cast<Act>(p.act)) {
    case Act::gelu:
      return with(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_tanh:
      return with(std::integral_constant<Act, Act::gelu_tanh>{});
    case Act::relu:
      return with(std::integral_constant<Act, Act::relu>{});
    case Act::silu:
      return with(std::integral_constant<Act, Act::silu>{});
    case Act::quick_gelu:
      return with(std::integral_constant<Act, Act::quick_gelu>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace mnp_fast::cuda

extern "C" {

int mnp_masked_act_forward(const MnpActForward* p) {
  using namespace mnp_fast::cuda;
  return dispatch(p->act, [&](auto act, auto number) {
    using T = decltype(number);
    const Forward<decltype(act)::value, T> op{p->act.mask, static_cast<const T*>(p->x), static_cast<T*>(p->y)};
    return launch_elementwise(op, p->act, aligned(p->x) && aligned(p->y));
  });
}

int mnp_masked_act_backward(const MnpActBackward* p) {
  using namespace mnp_fast::cuda;
  return dispatch(p->act, [&](auto act, auto number) {
    using T = decltype(number);
    const Backward<decltype(act)::value, T> op{p->act.mask, static_cast<const T*>(p->grad), static_cast<const T*>(p->x),
                                               static_cast<T*>(p->grad_x)};
    const bool wide = aligned(p->grad) && aligned(p->x) && aligned(p->grad_x);
    return launch_sums(op, p->act, wide, {p->sum_gact}, p->partial);
  });
}

int64_t mnp_masked_act_partial(int64_t n, int64_t c, int64_t s, bool channels_last) {
  return mnp_fast::cuda::sums_partial(n, c, s, channels_last, 1);
}
}
