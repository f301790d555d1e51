// Bytes moved for each number of x, e bytes wide: forward 2e (3e with a residual); backward 3e (grad, x, grad_x), e
// more each for y and grad_residual. Both are bound by memory: the aim is 80 % of the bandwidth of a copy of as many
// bytes.
#include "cpu/masked_affine.h"

#include "cpu/loops.h"

namespace mnp_fast::cpu {
namespace {

template <bool kResidual, bool kRelu>
MNP_ALWAYS_INLINE Vec forward_one(Vec x, Vec residual, Vec a, Vec b) {
  Vec y = fma(a, x, b);
  if constexpr (kResidual) y = y + residual;
  if constexpr (kRelu) y = y.relu();
  return y;
}

template <bool kResidual, bool kRelu, bool kSigns, class T, class Channels>
void forward_run(const Rows& rows, int64_t start, const T* x, const T* residual, T* y, Channels a, Channels b,
                 int64_t n, uint8_t* signs) {
  for_vectors(rows, start, n, [&](int64_t i, auto lanes) {
    const Vec r = kResidual ? lanes.take(residual + i) : Vec::fill(0.0f);
    const Vec value = forward_one<kResidual, kRelu>(lanes.take(x + i), r, a.load(i, lanes), b.load(i, lanes));
    lanes.store(value, y + i);
    if constexpr (kSigns) value.store_signs(signs, start + i);
  });
}

template <class T, bool kResidual, bool kRelu, bool kSigns = false>
void forward_units(const MaskedAffineForward& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  const auto run = [&](int64_t start, int64_t n, auto a, auto b) {
    forward_run<kResidual, kRelu, kSigns>(p.rows, start, x + start, kResidual ? residual + start : nullptr, y + start,
                                          a, b, n, p.signs);
  };
  for_rows(
      p.rows, begin, end,
      [&](int64_t start, int64_t c) {
        run(start, p.rows.row, OneChannel{Vec::fill(p.a[c])}, OneChannel{Vec::fill(p.b[c])});
      },
      [&](int64_t start, int64_t n) { run(start, n, EachChannel{p.a}, EachChannel{p.b}); });
}

template <class T>
void forward_typed(const MaskedAffineForward& p, int64_t begin, int64_t end) {
  if (p.signs != nullptr) {
    forward_units<T, true, true, true>(p, begin, end);
  } else if (p.residual != nullptr) {
    p.relu ? forward_units<T, true, true>(p, begin, end) : forward_units<T, true, false>(p, begin, end);
  } else {
    p.relu ? forward_units<T, false, true>(p, begin, end) : forward_units<T, false, false>(p, begin, end);
  }
}

void forward(const MaskedAffineForward& p, int64_t begin, int64_t end) {
  p.rows.dtype == DType::float32 ? forward_typed<float>(p, begin, end) : forward_typed<BFloat16>(p, begin, end);
  if (p.rows.streamed) end_of_streams();
}

// Where the sign behind the activation comes from.
enum class Sign { none, from_x, from_y, from_bits };

template <class T>
struct Streams {
  const T *grad, *x, *y;
  const uint8_t* signs;
  int64_t start;  // of this memory in all memory, which signs are counted in
  T *grad_x, *grad_residual;
  Streams at(int64_t i) const {
    return {grad + i,
            x + i,
            y ? y + i : nullptr,
            signs,
            start + i,
            grad_x ? grad_x + i : nullptr,
            grad_residual ? grad_residual + i : nullptr};
  }
};

// One vector of numbers at offset i.
template <Sign kSign, class T, class Lanes>
MNP_ALWAYS_INLINE void backward_one(const Streams<T>& t, int64_t i, Lanes lanes, Vec a, Vec b, Vec center, Vec& sum_g,
                                    Vec& sum_gx) {
  Vec g = lanes.take(t.grad + i);
  const Vec x = lanes.take(t.x + i);
  if constexpr (kSign == Sign::from_x) g = g.where_positive(fma(a, x, b));
  if constexpr (kSign == Sign::from_y) g = g.where_positive(lanes.take(t.y + i));
  if constexpr (kSign == Sign::from_bits) g = g.where_signs(t.signs, t.start + i);
  if (t.grad_x != nullptr) lanes.store(a * g, t.grad_x + i);
  if (t.grad_residual != nullptr) lanes.store(g, t.grad_residual + i);
  sum_g = sum_g + g;
  sum_gx = fma(g, x - center, sum_gx);
}

template <Sign kSign, class T>
void backward_row(const MaskedAffineBackward& p, const Streams<T>& streams, int64_t unit) {
  const int64_t c = unit % p.blocks.rows.channels, row = p.blocks.rows.row;
  const Vec a = Vec::fill(p.a[c]), b = Vec::fill(p.b[c]), center = Vec::fill(p.center[c]);
  const Streams<T> t = streams.at(unit * row);
  Vec sum_g = Vec::fill(0.0f), sum_gx = Vec::fill(0.0f);
  for_vectors(p.blocks.rows, unit * row, row,
              [&](int64_t i, auto lanes) { backward_one<kSign>(t, i, lanes, a, b, center, sum_g, sum_gx); });
  p.sum_g[unit] = sum(sum_g);
  p.sum_gx[unit] = sum(sum_gx);
}

template <Sign kSign, class T>
void backward_block(const MaskedAffineBackward& p, const Streams<T>& streams, int64_t unit) {
  const int64_t row = p.blocks.rows.row;
  float* sum_g = p.sum_g + unit * row;
  float* sum_gx = p.sum_gx + unit * row;
  for (int64_t i = 0; i < row; ++i) sum_g[i] = sum_gx[i] = 0.0f;
  for_rows_of_block(p.blocks, unit, [&](int64_t start, int64_t n) {
    const Streams<T> t = streams.at(start);
    for_vectors(p.blocks.rows, start, n, [&](int64_t i, auto lanes) {
      Vec g = lanes.load(sum_g + i), gx = lanes.load(sum_gx + i);
      backward_one<kSign>(t, i, lanes, lanes.load(p.a + i), lanes.load(p.b + i), lanes.load(p.center + i), g, gx);
      lanes.keep(g, sum_g + i);
      lanes.keep(gx, sum_gx + i);
    });
  });
}

template <class T, Sign kSign>
void backward_units(const MaskedAffineBackward& p, int64_t begin, int64_t end) {
  const Streams<T> streams{
      static_cast<const T*>(p.grad), static_cast<const T*>(p.x),      static_cast<const T*>(p.y), p.signs, 0,
      static_cast<T*>(p.grad_x),     static_cast<T*>(p.grad_residual)};
  for (int64_t unit = begin; unit < end; ++unit) {
    p.blocks.rows.channels_last ? backward_block<kSign>(p, streams, unit) : backward_row<kSign>(p, streams, unit);
  }
}

template <class T>
void backward_typed(const MaskedAffineBackward& p, int64_t begin, int64_t end) {
  if (!p.relu) {
    backward_units<T, Sign::none>(p, begin, end);
  } else if (p.signs != nullptr) {
    backward_units<T, Sign::from_bits>(p, begin, end);
  } else if (p.y == nullptr) {
    backward_units<T, Sign::from_x>(p, begin, end);
  } else {
    backward_units<T, Sign::from_y>(p, begin, end);
  }
}

void backward(const MaskedAffineBackward& p, int64_t begin, int64_t end) {
  p.blocks.rows.dtype == DType::float32 ? backward_typed<float>(p, begin, end)
                                        : backward_typed<BFloat16>(p, begin, end);
  if (p.blocks.rows.streamed) end_of_streams();
}

}  // namespace

namespace MNP_ISA {
const MaskedAffineKernels masked_affine = {forward, backward};
}

}  // namespace mnp_fast::cpu
