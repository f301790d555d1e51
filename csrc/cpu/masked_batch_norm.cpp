// Bytes moved for each number of x, e bytes wide. Forward: e for the sums, 2e to normalise (3e with a residual).
// Backward: 2e for the sums (grad, x; with relu and a residual y is read and grad_residual written too), 3e for grad_x
// (grad or grad_residual, x, grad_x). All are bound by memory.
#include "cpu/masked_batch_norm.h"

#include "cpu/loops.h"

namespace mnp_fast::cpu {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
// Numbers of a plane that float32 sums go over before they are added in float64.
constexpr int64_t kChunk = 4096;
// In planes up to this k is the first number: finding a mean first took as long as the sums (7 x 7). No number is
// further from the mean than the root of their count times the deviation, so that this is the bound of blocks too.
constexpr int64_t kSmallPlane = 256;
// Rows whose mean is k. Sums lose at most as much precision as if the unit had (its rows / kShiftRows) times the
// variance, however the data lies.
constexpr int64_t kShiftRows = 4;

// Sums of differences from k in several registers, since one after the other would wait for the adder.
struct Sums {
  static constexpr int kChains = 4;
  Vec sum[kChains], square[kChains];

  Sums() {
    for (int i = 0; i < kChains; ++i) sum[i] = square[i] = Vec::fill(0.0f);
  }
  MNP_ALWAYS_INLINE void add(int chain, Vec difference) {
    sum[chain] = sum[chain] + difference;
    square[chain] = fma(difference, difference, square[chain]);
  }
  static float total(const Vec* v) { return cpu::sum((v[0] + v[1]) + (v[2] + v[3])); }
};

template <class T>
Sums sums_of_run(const T* x, float k, int64_t n) {
  Sums sums;
  const Vec shift = Vec::fill(k);
  int64_t i = 0;
  for (; i + Sums::kChains * kWidth <= n; i += Sums::kChains * kWidth) {
    for (int chain = 0; chain < Sums::kChains; ++chain) sums.add(chain, Vec::load(x + i + chain * kWidth) - shift);
  }
  for (; i + kWidth <= n; i += kWidth) sums.add(0, Vec::load(x + i) - shift);
  if (i < n) {
    float part[kWidth];
    shift.store(part);
    sums.add(1, Vec::load(x + i, n - i) - Vec::load(part, n - i));
  }
  return sums;
}

template <class T>
void sums_of_plane(const BatchNormSums& p, int64_t unit) {
  const T* x = static_cast<const T*>(p.x) + unit * p.rows.row;
  const int64_t row = p.rows.row, first = row < kChunk ? row : kChunk;
  const float k = row <= kSmallPlane ? sum(Vec::load(x, 1))
                                     : Sums::total(sums_of_run(x, 0.0f, first).sum) / static_cast<float>(first);
  double sum = 0.0, square = 0.0;
  for (int64_t start = 0; start < row; start += kChunk) {
    const Sums sums = sums_of_run(x + start, k, row - start < kChunk ? row - start : kChunk);
    sum += static_cast<double>(Sums::total(sums.sum));
    square += static_cast<double>(Sums::total(sums.square));
  }
  p.k[unit] = k;
  p.sum[unit] = static_cast<float>(sum);
  p.square[unit] = static_cast<float>(square);
}

// kRows rows of n numbers each, added to the sums of the columns.
template <int kRows, class T>
void add_rows(const T* x, int64_t row, int64_t n, const float* k, float* sum, float* square) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    const Vec shift = lanes.load(k + i);
    Vec total = lanes.load(sum + i), squares = lanes.load(square + i);
    for (int r = 0; r < kRows; ++r) {
      const Vec difference = lanes.take(x + r * row + i) - shift;
      total = total + difference;
      squares = fma(difference, difference, squares);
    }
    lanes.store(total, sum + i);
    lanes.store(squares, square + i);
  });
}

template <class T>
void sums_of_block(const BatchNormSums& p, int64_t unit) {
  constexpr int kRows = 4;
  const int64_t row = p.rows.row, first = unit * p.block_rows * row;
  float *k = p.k + unit * row, *sum = p.sum + unit * row, *square = p.square + unit * row;
  const T* x = static_cast<const T*>(p.x) + first;
  int64_t left = p.rows.total - first < p.block_rows * row ? p.rows.total - first : p.block_rows * row;
  const int64_t shift_rows = left < kShiftRows * row ? 1 : kShiftRows;
  const int64_t columns = left < row ? left : row;
  for (int64_t i = columns; i < row; ++i) k[i] = sum[i] = square[i] = 0.0f;
  for_vectors(columns, [&](int64_t i, auto lanes) {
    Vec total = lanes.load(x + i);
    for (int64_t r = 1; r < shift_rows; ++r) total = total + lanes.load(x + r * row + i);
    lanes.store(total * Vec::fill(1.0f / static_cast<float>(shift_rows)), k + i);
    lanes.store(Vec::fill(0.0f), sum + i);
    lanes.store(Vec::fill(0.0f), square + i);
  });
  for (; left >= kRows * row; left -= kRows * row, x += kRows * row) add_rows<kRows>(x, row, row, k, sum, square);
  for (; left > 0; left -= row, x += row) add_rows<1>(x, row, left < row ? left : row, k, sum, square);
}

template <class T>
void sums_typed(const BatchNormSums& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    p.rows.channels_last ? sums_of_block<T>(p, unit) : sums_of_plane<T>(p, unit);
  }
}

void sums(const BatchNormSums& p, int64_t begin, int64_t end) {
  p.rows.dtype == DType::float32 ? sums_typed<float>(p, begin, end) : sums_typed<BFloat16>(p, begin, end);
}

// Where the sign behind the activation comes from.
enum class Sign { none, from_x, from_y };

template <Sign kSign, class T, class Channels>
void grad_x_run(const BatchNormGradX& t, int64_t start, int64_t n, Channels a, Channels b, Channels center, Channels p,
                Channels q) {
  const T* grad = static_cast<const T*>(t.grad) + start;
  const T* x = static_cast<const T*>(t.x) + start;
  const T* y = kSign == Sign::from_y ? static_cast<const T*>(t.y) + start : nullptr;
  T* grad_x = static_cast<T*>(t.grad_x) + start;
  for_vectors(t.rows, start, n, [&](int64_t i, auto lanes) {
    Vec g = lanes.take(grad + i);
    const Vec value = lanes.take(x + i), slope = a.load(i, lanes);
    if constexpr (kSign == Sign::from_x) g = g.where_positive(fma(slope, value, b.load(i, lanes)));
    if constexpr (kSign == Sign::from_y) g = g.where_positive(lanes.take(y + i));
    const Vec through_statistics = fma(p.load(i, lanes), value - center.load(i, lanes), q.load(i, lanes));
    lanes.store(fma(slope, g, through_statistics), grad_x + i);
  });
}

template <class T, Sign kSign>
void grad_x_units(const BatchNormGradX& t, int64_t begin, int64_t end) {
  for_rows(
      t.rows, begin, end,
      [&](int64_t start, int64_t c) {
        const auto one = [c](const float* v) { return OneChannel{Vec::fill(v[c])}; };
        grad_x_run<kSign, T>(t, start, t.rows.row, one(t.a), one(t.b), one(t.center), one(t.p), one(t.q));
      },
      [&](int64_t start, int64_t n) {
        grad_x_run<kSign, T>(t, start, n, EachChannel{t.a}, EachChannel{t.b}, EachChannel{t.center}, EachChannel{t.p},
                             EachChannel{t.q});
      });
}

template <class T>
void grad_x_typed(const BatchNormGradX& t, int64_t begin, int64_t end) {
  if (!t.relu) {
    grad_x_units<T, Sign::none>(t, begin, end);
  } else if (t.y == nullptr) {
    grad_x_units<T, Sign::from_x>(t, begin, end);
  } else {
    grad_x_units<T, Sign::from_y>(t, begin, end);
  }
}

void grad_x(const BatchNormGradX& t, int64_t begin, int64_t end) {
  t.rows.dtype == DType::float32 ? grad_x_typed<float>(t, begin, end) : grad_x_typed<BFloat16>(t, begin, end);
  if (t.rows.streamed) end_of_streams();
}

}  // namespace

namespace MNP_ISA {
const MaskedBatchNormKernels masked_batch_norm = {sums, grad_x};
}

}  // namespace mnp_fast::cpu
