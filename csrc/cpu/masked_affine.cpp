// Bytes moved for each number of x, e bytes wide: forward 2e (3e with a residual); backward 3e (grad, x, grad_x), e
// more each for y and grad_residual. Both are bound by memory: the aim is 80 % of the bandwidth of a copy of as many
// bytes.
#include "cpu/masked_affine.h"

#include "cpu/vec.h"

namespace mnp_fast::cpu {
namespace {

constexpr int64_t kWidth = Vec::kWidth;

// Coefficients of the channels along a run of numbers: one channel for all, or one channel each.
struct OneChannel {
  Vec a, b, center;
  Vec load_a(int64_t) const { return a; }
  Vec load_b(int64_t) const { return b; }
  Vec load_center(int64_t) const { return center; }
  Vec load_a(int64_t, int64_t) const { return a; }
  Vec load_b(int64_t, int64_t) const { return b; }
  Vec load_center(int64_t, int64_t) const { return center; }
};

struct EachChannel {
  const float *a, *b, *center;
  Vec load_a(int64_t i) const { return Vec::load(a + i); }
  Vec load_b(int64_t i) const { return Vec::load(b + i); }
  Vec load_center(int64_t i) const { return Vec::load(center + i); }
  Vec load_a(int64_t i, int64_t n) const { return Vec::load(a + i, n); }
  Vec load_b(int64_t i, int64_t n) const { return Vec::load(b + i, n); }
  Vec load_center(int64_t i, int64_t n) const { return Vec::load(center + i, n); }
};

template <bool kResidual, bool kRelu>
Vec forward_one(Vec x, Vec residual, Vec a, Vec b) {
  Vec y = fma(a, x, b);
  if constexpr (kResidual) y = y + residual;
  if constexpr (kRelu) y = y.relu();
  return y;
}

template <bool kResidual, bool kRelu, class T, class Channels>
void forward_run(const T* x, const T* residual, T* y, Channels channels, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec r = kResidual ? Vec::load(residual + i) : Vec::fill(0.0f);
    forward_one<kResidual, kRelu>(Vec::load(x + i), r, channels.load_a(i), channels.load_b(i)).store(y + i);
  }
  if (const int64_t rest = n - i; rest > 0) {
    const Vec r = kResidual ? Vec::load(residual + i, rest) : Vec::fill(0.0f);
    forward_one<kResidual, kRelu>(Vec::load(x + i, rest), r, channels.load_a(i, rest), channels.load_b(i, rest))
        .store(y + i, rest);
  }
}

template <class T, bool kResidual, bool kRelu>
void forward_units(const MaskedAffineForward& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t start = unit * p.row;
    const T* r = kResidual ? residual + start : nullptr;
    if (p.channels_last) {
      const int64_t n = p.total - start < p.row ? p.total - start : p.row;
      forward_run<kResidual, kRelu>(x + start, r, y + start, EachChannel{p.a, p.b, nullptr}, n);
    } else {
      const int64_t c = unit % p.channels;
      const OneChannel channel{Vec::fill(p.a[c]), Vec::fill(p.b[c]), Vec::fill(0.0f)};
      forward_run<kResidual, kRelu>(x + start, r, y + start, channel, p.row);
    }
  }
}

template <class T>
void forward_typed(const MaskedAffineForward& p, int64_t begin, int64_t end) {
  if (p.residual != nullptr) {
    p.relu ? forward_units<T, true, true>(p, begin, end) : forward_units<T, true, false>(p, begin, end);
  } else {
    p.relu ? forward_units<T, false, true>(p, begin, end) : forward_units<T, false, false>(p, begin, end);
  }
}

void forward(const MaskedAffineForward& p, int64_t begin, int64_t end) {
  p.dtype == DType::float32 ? forward_typed<float>(p, begin, end) : forward_typed<BFloat16>(p, begin, end);
}

// Where the sign behind the activation comes from.
enum class Sign { none, from_x, from_y };

template <class T>
struct Streams {
  const T *grad, *x, *y;
  T *grad_x, *grad_residual;
  Streams at(int64_t i) const {
    return {grad + i, x + i, y ? y + i : nullptr, grad_x ? grad_x + i : nullptr,
            grad_residual ? grad_residual + i : nullptr};
  }
};

// One vector of numbers at offset i; kPart: only the first n of them are there, and the others count as zero.
template <Sign kSign, bool kPart, class T>
MNP_ALWAYS_INLINE void backward_one(const Streams<T>& t, int64_t i, int64_t n, Vec a, Vec b, Vec center, Vec& sum_g,
                                    Vec& sum_gx) {
  const auto load = [i, n](const T* p) { return kPart ? Vec::load(p + i, n) : Vec::load(p + i); };
  const auto store = [i, n](Vec v, T* p) { kPart ? v.store(p + i, n) : v.store(p + i); };
  Vec g = load(t.grad);
  const Vec x = load(t.x);
  if constexpr (kSign == Sign::from_x) g = g.where_positive(fma(a, x, b));
  if constexpr (kSign == Sign::from_y) g = g.where_positive(load(t.y));
  if (t.grad_x != nullptr) store(a * g, t.grad_x);
  if (t.grad_residual != nullptr) store(g, t.grad_residual);
  sum_g = sum_g + g;
  sum_gx = fma(g, x - center, sum_gx);
}

template <Sign kSign, class T>
void backward_row(const MaskedAffineBackward& p, const Streams<T>& streams, int64_t unit) {
  const int64_t c = unit % p.channels;
  const Vec a = Vec::fill(p.a[c]), b = Vec::fill(p.b[c]), center = Vec::fill(p.center[c]);
  const Streams<T> t = streams.at(unit * p.row);
  Vec sum_g = Vec::fill(0.0f), sum_gx = Vec::fill(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= p.row; i += kWidth) backward_one<kSign, false>(t, i, kWidth, a, b, center, sum_g, sum_gx);
  if (i < p.row) backward_one<kSign, true>(t, i, p.row - i, a, b, center, sum_g, sum_gx);
  p.sum_g[unit] = sum(sum_g);
  p.sum_gx[unit] = sum(sum_gx);
}

// A row of n numbers, added to the sums of the columns.
template <Sign kSign, class T>
void backward_columns(const MaskedAffineBackward& p, const Streams<T>& t, int64_t n, float* sum_g, float* sum_gx) {
  const EachChannel channels{p.a, p.b, p.center};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    Vec g = Vec::load(sum_g + i), gx = Vec::load(sum_gx + i);
    backward_one<kSign, false>(t, i, kWidth, channels.load_a(i), channels.load_b(i), channels.load_center(i), g, gx);
    g.store(sum_g + i);
    gx.store(sum_gx + i);
  }
  if (const int64_t rest = n - i; rest > 0) {
    Vec g = Vec::load(sum_g + i, rest), gx = Vec::load(sum_gx + i, rest);
    backward_one<kSign, true>(t, i, rest, channels.load_a(i, rest), channels.load_b(i, rest),
                              channels.load_center(i, rest), g, gx);
    g.store(sum_g + i, rest);
    gx.store(sum_gx + i, rest);
  }
}

template <Sign kSign, class T>
void backward_block(const MaskedAffineBackward& p, const Streams<T>& streams, int64_t unit) {
  const int64_t block = unit % p.blocks;
  const Streams<T> sample = streams.at(unit / p.blocks * p.sample);
  float* sum_g = p.sum_g + unit * p.row;
  float* sum_gx = p.sum_gx + unit * p.row;
  for (int64_t i = 0; i < p.row; ++i) sum_g[i] = sum_gx[i] = 0.0f;
  int64_t start = block * p.block_rows * p.row;
  int64_t end = start + p.block_rows * p.row;
  if (end > p.sample) end = p.sample;
  // One row after the other: several at once keep the sums in registers, but were seen to halve the speed from memory.
  for (; start < end; start += p.row) {
    backward_columns<kSign>(p, sample.at(start), end - start < p.row ? end - start : p.row, sum_g, sum_gx);
  }
}

template <class T, Sign kSign>
void backward_units(const MaskedAffineBackward& p, int64_t begin, int64_t end) {
  const Streams<T> streams{static_cast<const T*>(p.grad), static_cast<const T*>(p.x), static_cast<const T*>(p.y),
                           static_cast<T*>(p.grad_x), static_cast<T*>(p.grad_residual)};
  for (int64_t unit = begin; unit < end; ++unit) {
    p.channels_last ? backward_block<kSign>(p, streams, unit) : backward_row<kSign>(p, streams, unit);
  }
}

template <class T>
void backward_typed(const MaskedAffineBackward& p, int64_t begin, int64_t end) {
  if (!p.relu) {
    backward_units<T, Sign::none>(p, begin, end);
  } else if (p.y == nullptr) {
    backward_units<T, Sign::from_x>(p, begin, end);
  } else {
    backward_units<T, Sign::from_y>(p, begin, end);
  }
}

void backward(const MaskedAffineBackward& p, int64_t begin, int64_t end) {
  p.dtype == DType::float32 ? backward_typed<float>(p, begin, end) : backward_typed<BFloat16>(p, begin, end);
}

}  // namespace

namespace MNP_ISA {
const MaskedAffineKernels masked_affine = {forward, backward};
}

}  // namespace mnp_fast::cpu
