// Bytes moved for each number of x, e bytes wide: forward 2e, backward 3e (grad, x, grad_x). The aim is 80 % of the
// bandwidth of a copy of as many bytes, which relu reaches. The others add one exp and one polynomial or division a
// number, from which both the activation and its derivative come, or with AVX-512 and bfloat16 one cubic.
#include "cpu/masked_act.h"

#include "cpu/loops.h"
#include "cpu/math.h"

namespace mnp_fast::cpu {
namespace {

// An activation and its derivative; what a caller leaves unused is not computed.
template <class V>
struct Value {
  V act, slope;
};

// Where tables end: there a*Q(a) and a*D(a) are below 1e-6.
constexpr float kGeluTable = 5.5f, kSiluTable = 18.0f;

// Q(a) and D(a) of act.h.
template <class V>
struct Tail {
  V q, d;
};

struct Gelu {
  static constexpr float kLimit = kGeluLimit, kStep = kGeluTable / 31.4f;
  static double q(double a) { return 0.5 * __builtin_erfc(a * 0.70710678118654752); }
  static double d(double a) { return 0.39894228040143268 * __builtin_exp(-0.5 * a * a); }
  template <class T, class V>
  static MNP_ALWAYS_INLINE Tail<V> tail(V a) {
    const V e = exp2<T>(a * a * V::fill(-0.5f * kLog2E));
    return {e * normal_tail<T>(a), e * V::fill(0.398942280f)};
  }
};

// Q(a) = 1/(1 + exp(g)), `slope` being g'(a).
template <class T, class V>
MNP_ALWAYS_INLINE Tail<V> logistic_tail(V g, V slope) {
  const V e = exp2<T>(g * V::fill(-kLog2E)), one = V::fill(1.0f);
  const V q = e / (one + e);
  return {q, (q - q * q) * slope};
}

struct GeluTanh {
  static constexpr float kLimit = kGeluTanhLimit, kStep = kGeluTable / 31.4f;
  static double q(double a) { return 1.0 / (1.0 + __builtin_exp(1.5957691216057308 * (a + 0.044715 * a * a * a))); }
  static double d(double a) { return (q(a) - q(a) * q(a)) * 1.5957691216057308 * (1.0 + 0.134145 * a * a); }
  template <class T, class V>
  static MNP_ALWAYS_INLINE Tail<V> tail(V a) {
    constexpr float k = 1.59576912f, cubic = 0.044715f;
    const V square = a * a, one = V::fill(k);
    return logistic_tail<T>(a * fma(square, V::fill(k * cubic), one), fma(square, V::fill(3.0f * k * cubic), one));
  }
};

struct Silu {
  static constexpr float kLimit = kSiluLimit, kStep = kSiluTable / 31.4f;
  static double q(double a) { return 1.0 / (1.0 + __builtin_exp(a)); }
  static double d(double a) { return q(a) - q(a) * q(a); }
  template <class T, class V>
  static MNP_ALWAYS_INLINE Tail<V> tail(V a) {
    return logistic_tail<T>(a, V::fill(1.0f));
  }
};

struct QuickGelu {
  static constexpr float kLimit = kQuickGeluLimit, kStep = kSiluTable / 1.702f / 31.4f;
  static double q(double a) { return 1.0 / (1.0 + __builtin_exp(1.702 * a)); }
  static double d(double a) { return (q(a) - q(a) * q(a)) * 1.702; }
  template <class T, class V>
  static MNP_ALWAYS_INLINE Tail<V> tail(V a) {
    const V k = V::fill(1.702f);
    return logistic_tail<T>(k * a, k);
  }
};

template <class Curve, class T>
struct Smooth {
  template <class V>
  MNP_ALWAYS_INLINE Value<V> at(V x) const {
    const V a = min(V::fill(Curve::kLimit), x.abs()), half = V::fill(0.5f);
    const Tail<V> t = Curve::template tail<T>(a);
    return {x.relu() - a * t.q, half + (fma(a, t.d, half) - t.q).negated_with(x)};
  }
};

#if defined(__AVX512F__)
// For bfloat16: a*Q(a) as 32 cubics in a that stay in registers, and its slope as theirs. A third of the arithmetic of
// an exp and a polynomial, with errors below 1e-5 and 3e-4 where bfloat16 rounds by 2e-3 (docs/decisions.md).
template <class Curve>
struct Smooth<Curve, BFloat16> {
  Table32 powers[4];

  // Each meets the function and its slope at both ends of its stretch, which lies around k*kStep.
  Smooth() {
    float fitted[4][32];
    for (int k = 0; k < 32; ++k) {
      const double low = k == 0 ? 0.0 : (k - 0.5) * Curve::kStep, high = (k + 0.5) * Curve::kStep;
      const double first = low * Curve::q(low), last = high * Curve::q(high), width = high - low;
      const double slope = Curve::q(low) - low * Curve::d(low), end = Curve::q(high) - high * Curve::d(high);
      const double mean = (last - first) / width;
      const double square = (3.0 * mean - 2.0 * slope - end) / width, cube = (slope + end - 2.0 * mean) / width / width;
      // Powers of a - low, as powers of a.
      fitted[0][k] = static_cast<float>(first - low * (slope - low * (square - low * cube)));
      fitted[1][k] = static_cast<float>(slope - low * (2.0 * square - 3.0 * low * cube));
      fitted[2][k] = static_cast<float>(square - 3.0 * low * cube);
      fitted[3][k] = static_cast<float>(cube);
    }
    for (int i = 0; i < 4; ++i) powers[i] = Table32::load(fitted[i]);
  }

  template <class V>
  MNP_ALWAYS_INLINE Value<V> at(V x) const {
    // Below 31.5: that is as near to 32, of which the low bits are those of 0.
    const V a = min(V::fill(31.4f * Curve::kStep), x.abs()), half = V::fill(0.5f);
    // Beside this only the number of the cubic is left of a/kStep, in the low bits.
    const V number = fma(a, V::fill(1.0f / Curve::kStep), V::fill(12582912.0f));
    // p1 + p2*a + p3*a^2 is in both: the cubic is p0 + a times that, its slope that + a*(p2 + 2*p3*a).
    const V top = powers[3].at(number) * a, upper = powers[2].at(number) + top;
    const V inner = fma(upper, a, powers[1].at(number));
    const V act = fma(inner, a, powers[0].at(number)), slope = fma(upper + top, a, inner);
    return {x.relu() - act, half + (half - slope).negated_with(x)};
  }
};
#endif

struct Relu {
  template <class V>
  MNP_ALWAYS_INLINE Value<V> at(V x) const {
    return {x.relu(), V::fill(1.0f).where_positive(x)};
  }
};

template <class F, class V>
MNP_ALWAYS_INLINE V through(const F&, V /*x*/, V slope, V grad) {
  return slope * grad;
}

// Chosen, not multiplied: behind a closed relu infinity and NaN are zero too, as torch has it.
template <class V>
MNP_ALWAYS_INLINE V through(const Relu&, V x, V /*slope*/, V grad) {
  return grad.where_positive(x);
}

template <class F, class T, class Channels>
void forward_run(const F& f, const Rows& rows, int64_t start, const T* x, T* y, Channels mask, int64_t n) {
  for_vectors<WideVec>(rows, start, n, [=](int64_t i, auto lanes) {
    lanes.store(mask.load(i, lanes) * f.at(lanes.take(x + i)).act, y + i);
  });
}

template <class T, class F>
void forward_units(const F& f, const MaskedActForward& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  for_rows(
      p.rows, begin, end,
      [&](int64_t start, int64_t c) {
        forward_run(f, p.rows, start, x + start, y + start, OneChannel{Vec::fill(p.mask[c])}, p.rows.row);
      },
      [&](int64_t start, int64_t n) { forward_run(f, p.rows, start, x + start, y + start, EachChannel{p.mask}, n); });
}

template <class T>
struct Streams {
  const T *grad, *x;
  T* grad_x;
};

// One vector of numbers at offset i; returns total + grad*act(x).
template <class F, class T, class Lanes, class Mask, class Total>
MNP_ALWAYS_INLINE Total backward_one(const F& f, const Streams<T>& t, int64_t i, Lanes lanes, Mask mask, Total total) {
  const auto g = lanes.take(t.grad + i), x = lanes.take(t.x + i);
  const auto value = f.at(x);
  if (t.grad_x != nullptr) lanes.store(mask * through(f, x, value.slope, g), t.grad_x + i);
  return fma(g, value.act, total);
}

template <class F, class T>
void backward_row(const F f, const MaskedActBackward& p, const Streams<T>& t, int64_t unit) {
  const int64_t row = p.blocks.rows.row, start = unit * row;
  const Vec mask = Vec::fill(p.mask[unit % p.blocks.rows.channels]);
  Vec total = Vec::fill(0.0f);
  for_vectors<WideVec>(p.blocks.rows, start, row,
                       [&](int64_t i, auto lanes) { total = backward_one(f, t, start + i, lanes, mask, total); });
  p.sum_gact[unit] = sum(total);
}

template <class F, class T>
void backward_block(const F f, const MaskedActBackward& p, const Streams<T>& t, int64_t unit) {
  const int64_t row = p.blocks.rows.row;
  float* sums = p.sum_gact + unit * row;
  for (int64_t i = 0; i < row; ++i) sums[i] = 0.0f;
  for_rows_of_block(p.blocks, unit, [&](int64_t start, int64_t n) {
    for_vectors<WideVec>(p.blocks.rows, start, n, [&](int64_t i, auto lanes) {
      lanes.keep(backward_one(f, t, start + i, lanes, lanes.load(p.mask + i), lanes.load(sums + i)), sums + i);
    });
  });
}

template <class T, class F>
void backward_units(const F& f, const MaskedActBackward& p, int64_t begin, int64_t end) {
  const Streams<T> t{static_cast<const T*>(p.grad), static_cast<const T*>(p.x), static_cast<T*>(p.grad_x)};
  for (int64_t unit = begin; unit < end; ++unit) {
    p.blocks.rows.channels_last ? backward_block(f, p, t, unit) : backward_row(f, p, t, unit);
  }
}

// run(f, t) with the activation and a number of the dtype.
template <class Run>
void dispatch(Act act, DType dtype, Run run) {
  const auto smooth = [&](auto curve) {
    using Curve = decltype(curve);
    if (dtype == DType::float32) return run(Smooth<Curve, float>{}, float{});
    static const Smooth<Curve, BFloat16> fitted_once;
    run(fitted_once, BFloat16{});
  };
  switch (act) {
    case Act::gelu:
      return smooth(Gelu{});
    case Act::gelu_tanh:
      return smooth(GeluTanh{});
    case Act::relu:
      return dtype == DType::float32 ? run(Relu{}, float{}) : run(Relu{}, BFloat16{});
    case Act::silu:
      return smooth(Silu{});
    case Act::quick_gelu:
      return smooth(QuickGelu{});
  }
}

void forward(const MaskedActForward& p, int64_t begin, int64_t end) {
  dispatch(p.act, p.rows.dtype, [&](const auto& f, auto t) { forward_units<decltype(t)>(f, p, begin, end); });
  if (p.rows.streamed) end_of_streams();
}

void backward(const MaskedActBackward& p, int64_t begin, int64_t end) {
  dispatch(p.act, p.blocks.rows.dtype, [&](const auto& f, auto t) { backward_units<decltype(t)>(f, p, begin, end); });
  if (p.blocks.rows.streamed) end_of_streams();
}

}  // namespace

namespace MNP_ISA {
const MaskedActKernels masked_act = {forward, backward};
}

}  // namespace mnp_fast::cpu
