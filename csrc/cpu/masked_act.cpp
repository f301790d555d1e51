// Bytes moved for each number of x, e bytes wide: forward 2e, backward 3e (grad, x, grad_x). The aim is 80 % of the
// bandwidth of a copy of as many bytes with relu; the others add one exp and one polynomial or division a number, from
// which both the activation and its derivative come.
#include "cpu/masked_act.h"

#include "cpu/loops.h"
#include "cpu/math.h"

namespace mnp_fast::cpu {
namespace {

// An activation and its derivative; what a caller leaves unused is not computed.
struct Value {
  Vec act, slope;
};

// Q(a) and D(a) of act.h.
struct Tail {
  Vec q, d;
};

struct Gelu {
  static constexpr float kLimit = kGeluLimit;
  template <class T>
  static MNP_ALWAYS_INLINE Tail tail(Vec a) {
    const Vec e = exp2<T>(a * a * Vec::fill(-0.5f * kLog2E));
    return {e * normal_tail<T>(a), e * Vec::fill(0.398942280f)};
  }
};

// Q(a) = 1/(1 + exp(g)), `slope` being g'(a).
template <class T>
MNP_ALWAYS_INLINE Tail logistic_tail(Vec g, Vec slope) {
  const Vec e = exp2<T>(g * Vec::fill(-kLog2E)), one = Vec::fill(1.0f);
  const Vec q = e / (one + e);
  return {q, (q - q * q) * slope};
}

struct GeluTanh {
  static constexpr float kLimit = kGeluTanhLimit;
  template <class T>
  static MNP_ALWAYS_INLINE Tail tail(Vec a) {
    constexpr float k = 1.59576912f, cubic = 0.044715f;
    const Vec square = a * a, one = Vec::fill(k);
    return logistic_tail<T>(a * fma(square, Vec::fill(k * cubic), one), fma(square, Vec::fill(3.0f * k * cubic), one));
  }
};

struct Silu {
  static constexpr float kLimit = kSiluLimit;
  template <class T>
  static MNP_ALWAYS_INLINE Tail tail(Vec a) {
    return logistic_tail<T>(a, Vec::fill(1.0f));
  }
};

struct QuickGelu {
  static constexpr float kLimit = kQuickGeluLimit;
  template <class T>
  static MNP_ALWAYS_INLINE Tail tail(Vec a) {
    const Vec k = Vec::fill(1.702f);
    return logistic_tail<T>(k * a, k);
  }
};

template <class Curve>
struct Smooth {
  template <class T>
  static MNP_ALWAYS_INLINE Value at(Vec x) {
    const Vec a = min(Vec::fill(Curve::kLimit), x.abs()), half = Vec::fill(0.5f);
    const Tail t = Curve::template tail<T>(a);
    return {x.relu() - a * t.q, half + (fma(a, t.d, half) - t.q).negated_with(x)};
  }
};

struct Relu {
  template <class T>
  static MNP_ALWAYS_INLINE Value at(Vec x) {
    return {x.relu(), Vec::fill(1.0f).where_positive(x)};
  }
};

template <class F, class T, class Channels>
void forward_run(const Rows& rows, int64_t start, const T* x, T* y, Channels mask, int64_t n) {
  for_vectors(rows, start, n, [=](int64_t i, auto lanes) {
    lanes.store(mask.load(i, lanes) * F::template at<T>(lanes.load(x + i)).act, y + i);
  });
}

template <class F, class T>
void forward_units(const MaskedActForward& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  for_rows(
      p.rows, begin, end,
      [&](int64_t start, int64_t c) {
        forward_run<F>(p.rows, start, x + start, y + start, OneChannel{Vec::fill(p.mask[c])}, p.rows.row);
      },
      [&](int64_t start, int64_t n) { forward_run<F>(p.rows, start, x + start, y + start, EachChannel{p.mask}, n); });
}

template <class T>
struct Streams {
  const T *grad, *x;
  T* grad_x;
};

// One vector of numbers at offset i; returns grad*act(x).
template <class F, class T, class Lanes>
MNP_ALWAYS_INLINE Vec backward_one(const Streams<T>& t, int64_t i, Lanes lanes, Vec mask) {
  const Vec g = lanes.take(t.grad + i);
  const Value value = F::template at<T>(lanes.take(t.x + i));
  if (t.grad_x != nullptr) lanes.store(mask * (value.slope * g), t.grad_x + i);
  return g * value.act;
}

template <class F, class T>
void backward_row(const MaskedActBackward& p, const Streams<T>& t, int64_t unit) {
  const int64_t row = p.blocks.rows.row, start = unit * row;
  const Vec mask = Vec::fill(p.mask[unit % p.blocks.rows.channels]);
  Vec total = Vec::fill(0.0f);
  for_vectors(p.blocks.rows, start, row,
              [&](int64_t i, auto lanes) { total = total + backward_one<F>(t, start + i, lanes, mask); });
  p.sum_gact[unit] = sum(total);
}

template <class F, class T>
void backward_block(const MaskedActBackward& p, const Streams<T>& t, int64_t unit) {
  const int64_t row = p.blocks.rows.row;
  float* sums = p.sum_gact + unit * row;
  for (int64_t i = 0; i < row; ++i) sums[i] = 0.0f;
  for_rows_of_block(p.blocks, unit, [&](int64_t start, int64_t n) {
    for_vectors(p.blocks.rows, start, n, [&](int64_t i, auto lanes) {
      lanes.keep(lanes.load(sums + i) + backward_one<F>(t, start + i, lanes, lanes.load(p.mask + i)), sums + i);
    });
  });
}

template <class F, class T>
void backward_units(const MaskedActBackward& p, int64_t begin, int64_t end) {
  const Streams<T> t{static_cast<const T*>(p.grad), static_cast<const T*>(p.x), static_cast<T*>(p.grad_x)};
  for (int64_t unit = begin; unit < end; ++unit) {
    p.blocks.rows.channels_last ? backward_block<F>(p, t, unit) : backward_row<F>(p, t, unit);
  }
}

// run(f, t) with an object of the activation and a number of the dtype.
template <class Run>
void dispatch(Act act, DType dtype, Run run) {
  const auto typed = [&](auto f) { dtype == DType::float32 ? run(f, float{}) : run(f, BFloat16{}); };
  switch (act) {
    case Act::gelu:
      return typed(Smooth<Gelu>{});
    case Act::gelu_tanh:
      return typed(Smooth<GeluTanh>{});
    case Act::relu:
      return typed(Relu{});
    case Act::silu:
      return typed(Smooth<Silu>{});
    case Act::quick_gelu:
      return typed(Smooth<QuickGelu>{});
  }
}

void forward(const MaskedActForward& p, int64_t begin, int64_t end) {
  dispatch(p.act, p.rows.dtype, [&](auto f, auto t) { forward_units<decltype(f), decltype(t)>(p, begin, end); });
  if (p.rows.streamed) end_of_streams();
}

void backward(const MaskedActBackward& p, int64_t begin, int64_t end) {
  dispatch(p.act, p.blocks.rows.dtype,
           [&](auto f, auto t) { backward_units<decltype(f), decltype(t)>(p, begin, end); });
  if (p.blocks.rows.streamed) end_of_streams();
}

}  // namespace

namespace MNP_ISA {
const MaskedActKernels masked_act = {forward, backward};
}

}  // namespace mnp_fast::cpu
