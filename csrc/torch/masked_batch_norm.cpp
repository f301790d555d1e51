// The CPU kernels of masked_batch_norm as torch operators. mnp_fast/ops/op_masked_batch_norm.py holds the public op.
#include "cpu/masked_batch_norm.h"

#include <cmath>
#include <vector>

#include "torch/masked_affine.h"
#include "torch/rows.h"

namespace mnp_fast {
namespace {

// What the units leave, as items x channels: where channels are inside, an item is every repetition of them in a row.
struct PartialSums {
  int64_t items, channels;
  std::vector<float> values;

  PartialSums(int64_t items, int64_t channels) : items(items), channels(channels), values(3 * items * channels) {}
  float* k() { return values.data(); }
  float* sum() { return values.data() + items * channels; }
  float* square() { return values.data() + 2 * items * channels; }
};

// Adds up what the units left, item by item, in float64. count(item): values of a channel in the item.
template <class Count>
void finish_statistics(PartialSums& partial, Count count, double values, double eps, float* mean, float* rstd) {
  const int64_t c = partial.channels;
  const float *k = partial.k(), *sum = partial.sum(), *square = partial.square();
  torch::stable::parallel_for(0, c, kGrain / partial.items + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> means(end - begin), squares(end - begin);
    for (int64_t item = 0; item < partial.items; ++item) {
      const double n = static_cast<double>(count(item));
      for (int64_t i = begin; i < end; ++i) means[i - begin] += n * k[item * c + i] + sum[item * c + i];
    }
    for (double& m : means) m /= values;
    for (int64_t item = 0; item < partial.items; ++item) {
      const double n = static_cast<double>(count(item));
      for (int64_t i = begin; i < end; ++i) {
        // The sum of (x - mean)^2 from those of x - k and (x - k)^2.
        const double apart = k[item * c + i] - means[i - begin];
        squares[i - begin] += square[item * c + i] + apart * (2.0 * sum[item * c + i] + n * apart);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      mean[i] = static_cast<float>(means[i - begin]);
      // Not std::max: it would make a number of NaN.
      const double variance = squares[i - begin] < 0.0 ? 0.0 : squares[i - begin] / values;
      rstd[i] = static_cast<float>(1.0 / std::sqrt(variance + eps));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_batch_norm(Tensor x, Tensor mask, Tensor weight, Tensor bias,
                                                     std::optional<Tensor> residual, int64_t n, int64_t c, int64_t s,
                                                     bool channels_last, double eps, bool relu, int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_dense(x, layout.numel(), "x");
  STD_TORCH_CHECK(x.numel() > 0, "x is empty");
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_batch_norm);
  const cpu::DType dtype = dtype_of(x, "x");
  check_vector(mask, c, x, "mask");
  const float* gamma = check_vector(weight, c, x, "weight");
  Tensor mean = torch::stable::empty_like(mask), rstd = torch::stable::empty_like(mask);
  Tensor scale = torch::stable::empty_like(mask);

  const cpu::Rows rows = rows_of(dtype, layout);
  const int64_t row = rows.row, times = channels_last ? row / c : 1;
  const int64_t block_rows = kBlock / row + 1;
  const int64_t unit_size = channels_last ? block_rows * row : row;
  const int64_t units = (layout.numel() + unit_size - 1) / unit_size;
  PartialSums partial(channels_last ? units * times : n, c);
  const cpu::BatchNormSums p{rows, x.const_data_ptr(), partial.k(), partial.sum(), partial.square(), block_rows};
  torch::stable::parallel_for(0, units, kGrain / unit_size + 1,
                              [&](int64_t begin, int64_t end) { kernel.sums(p, begin, end); });
  const auto count = [&](int64_t item) -> int64_t {
    if (!channels_last) return s;
    const int64_t unit = item / times, first = unit * block_rows * times;
    const int64_t positions = n * s - first < block_rows * times ? n * s - first : block_rows * times;
    return (positions - item % times + times - 1) / times;
  };
  float* r = static_cast<float*>(rstd.mutable_data_ptr());
  finish_statistics(partial, count, static_cast<double>(n * s), eps, static_cast<float*>(mean.mutable_data_ptr()), r);
  float* a = static_cast<float*>(scale.mutable_data_ptr());
  for (int64_t i = 0; i < c; ++i) a[i] = gamma[i] * r[i];
  return {masked_affine(x, mask, scale, mean, bias, residual, n, c, s, channels_last, relu, isa), mean, rstd};
}

// scale = weight * rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_batch_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                                      Tensor mask, Tensor scale, Tensor bias,
                                                                      Tensor mean, Tensor rstd, int64_t n, int64_t c,
                                                                      int64_t s, bool channels_last, bool relu,
                                                                      bool need_grad_x, bool need_grad_residual,
                                                                      int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_dense(x, layout.numel(), "x");
  STD_TORCH_CHECK(x.numel() > 0, "x is empty");
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_batch_norm);
  const cpu::DType dtype = dtype_of(x, "x");
  const float* r = check_vector(rstd, c, x, "rstd");
  auto [none, grad_residual, sum_g, sum_gx] = masked_affine_backward(
      grad, x, y, mask, scale, mean, bias, n, c, s, channels_last, relu, false, need_grad_residual, isa);
  const float* g = static_cast<const float*>(sum_g.const_data_ptr());
  float* gx = static_cast<float*>(sum_gx.mutable_data_ptr());
  std::vector<double> total_g(c), total_gx(c);
  for (int64_t sample = 0; sample < n; ++sample) {
    for (int64_t i = 0; i < c; ++i) {
      gx[sample * c + i] *= r[i];
      total_g[i] += g[sample * c + i];
      total_gx[i] += gx[sample * c + i];
    }
  }
  if (!need_grad_x) return {none, grad_residual, sum_g, sum_gx};

  Tensor grad_x = torch::stable::empty_like(x);
  cpu::Rows rows = rows_of(dtype, layout);
  rows.streamed = streamed(grad_x);
  const int64_t entries = channels_last ? rows.row : c;
  const Coefficients coefficients(x, mask, scale, mean, bias, c, entries);
  std::vector<float> slope(entries), offset(entries);
  for (int64_t i = 0; i < entries; ++i) {
    const double a = coefficients.a()[i], values = static_cast<double>(n * s);
    slope[i] = static_cast<float>(-a * r[i % c] * total_gx[i % c] / values);
    offset[i] = static_cast<float>(-a * total_g[i % c] / values);
  }
  // The gradient behind the activation is read where it has been written, and made again where it has not.
  const cpu::BatchNormGradX p{rows,
                              relu && !need_grad_residual,
                              need_grad_residual ? grad_residual.const_data_ptr() : grad.const_data_ptr(),
                              x.const_data_ptr(),
                              pointer(y),
                              grad_x.mutable_data_ptr(),
                              coefficients.a(),
                              coefficients.b(),
                              coefficients.center(),
                              slope.data(),
                              offset.data()};
  for_units(rows, [&](int64_t begin, int64_t end) { kernel.grad_x(p, begin, end); });
  return {grad_x, grad_residual, sum_g, sum_gx};
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cpu, m) {
  m.def(
      "masked_batch_norm(Tensor x, Tensor mask, Tensor weight, Tensor bias, Tensor? residual, int n, int c, int s, "
      "bool channels_last, float eps, bool relu, int isa) -> (Tensor, Tensor, Tensor)");
  m.def(
      "masked_batch_norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor mask, Tensor scale, Tensor bias, "
      "Tensor mean, Tensor rstd, int n, int c, int s, bool channels_last, bool relu, bool need_grad_x, "
      "bool need_grad_residual, int isa) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cpu, CPU, m) {
  m.impl("masked_batch_norm", TORCH_BOX(&mnp_fast::masked_batch_norm));
  m.impl("masked_batch_norm_backward", TORCH_BOX(&mnp_fast::masked_batch_norm_backward));
}
