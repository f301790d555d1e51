// The CPU kernels of masked_affine as torch operators. mnp_fast/ops/op_masked_affine.py holds the public op.
#include "cpu/masked_affine.h"

#include <numeric>
#include <tuple>
#include <vector>

#include "torch/common_cpu.h"

namespace mnp_fast {
namespace {

using cpu::DType;

// Numbers in a unit of the backward where channels are inside: fixed, so that sums do not depend on the threads.
constexpr int64_t kBlock = 65536;

const cpu::MaskedAffineKernels& kernels(int64_t isa) { return MNP_CHOOSE_KERNELS(usable_isa(isa), masked_affine); }

DType dtype_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "x is not on the CPU");
  if (x.scalar_type() == ScalarType::Float) return DType::float32;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x is neither float32 nor bfloat16");
  return DType::bfloat16;
}

// How often the channels are repeated in a row: enough for whole vectors where there are few channels, at most `most`.
int64_t repeats(int64_t channels, int64_t most) {
  constexpr int64_t kVector = 16;
  int64_t times = kVector / std::gcd(channels, kVector);
  if (channels * times > 4096) return 1;
  while (channels * times < 64) times *= 2;
  return times <= most ? times : 1;
}

// a, b and center, each repeated to one row.
struct Coefficients {
  std::vector<float> values;
  int64_t row;

  Coefficients(const Tensor& x, const Tensor& mask, const Tensor& scale, const Tensor& center, const Tensor& shift,
               int64_t channels, int64_t times)
      : values(3 * channels * times), row(channels * times) {
    const float* m = check_vector(mask, channels, x, "mask");
    const float* s = check_vector(scale, channels, x, "scale");
    const float* mean = check_vector(center, channels, x, "center");
    const float* t = check_vector(shift, channels, x, "shift");
    for (int64_t i = 0; i < row; ++i) {
      const int64_t c = i % channels;
      const float a = m[c] * s[c];
      values[i] = a;
      values[row + i] = t[c] - a * mean[c];
      values[2 * row + i] = mean[c];
    }
  }
  const float* a() const { return values.data(); }
  const float* b() const { return values.data() + row; }
  const float* center() const { return values.data() + 2 * row; }
};

Tensor masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, std::optional<Tensor> residual,
                     int64_t n, int64_t c, int64_t s, bool channels_last, bool relu, int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_dense(x, layout.numel(), "x");
  if (residual.has_value()) check_like(*residual, x, "residual");
  const auto& kernel = kernels(isa);
  const DType dtype = dtype_of(x);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;

  const Coefficients coefficients(x, mask, scale, center, shift, c, channels_last ? repeats(c, n * s) : 1);
  const int64_t row = channels_last ? coefficients.row : s;
  const cpu::MaskedAffineForward p{dtype,
                                   relu,
                                   channels_last,
                                   x.const_data_ptr(),
                                   pointer(residual),
                                   y.mutable_data_ptr(),
                                   coefficients.a(),
                                   coefficients.b(),
                                   c,
                                   row,
                                   layout.numel()};
  const int64_t units = (layout.numel() + row - 1) / row;
  torch::stable::parallel_for(0, units, kGrain / row + 1,
                              [&](int64_t begin, int64_t end) { kernel.forward(p, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_affine_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                                  Tensor mask, Tensor scale, Tensor center,
                                                                  Tensor shift, int64_t n, int64_t c, int64_t s,
                                                                  bool channels_last, bool relu, bool need_grad_x,
                                                                  bool need_grad_residual, int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_dense(x, layout.numel(), "x");
  check_like(grad, x, "grad");
  if (y.has_value()) check_like(*y, x, "y");
  const auto& kernel = kernels(isa);
  const DType dtype = dtype_of(x);
  Tensor grad_x = need_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_residual = need_grad_residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor sum_g = torch::stable::new_empty(mask, {n, c});
  Tensor sum_gx = torch::stable::new_empty(mask, {n, c});
  if (x.numel() == 0) {
    torch::stable::zero_(sum_g);
    torch::stable::zero_(sum_gx);
    return {grad_x, grad_residual, sum_g, sum_gx};
  }

  const int64_t times = channels_last ? repeats(c, s) : 1;
  const Coefficients coefficients(x, mask, scale, center, shift, c, times);
  const int64_t row = channels_last ? coefficients.row : s;
  const int64_t block_rows = kBlock / row + 1;
  const int64_t blocks = channels_last ? (c * s + block_rows * row - 1) / (block_rows * row) : 1;
  const int64_t units = channels_last ? n * blocks : n * c;
  float* out_g = static_cast<float*>(sum_g.mutable_data_ptr());
  float* out_gx = static_cast<float*>(sum_gx.mutable_data_ptr());
  // A sample in several parts: each part has sums of its own, added up below in the order of memory.
  const bool parts = channels_last && (blocks > 1 || times > 1);
  std::vector<float> partial(parts ? 2 * units * row : 0);
  cpu::MaskedAffineBackward p{dtype,
                              relu,
                              channels_last,
                              grad.const_data_ptr(),
                              x.const_data_ptr(),
                              pointer(y),
                              need_grad_x ? grad_x.mutable_data_ptr() : nullptr,
                              need_grad_residual ? grad_residual.mutable_data_ptr() : nullptr,
                              coefficients.a(),
                              coefficients.b(),
                              coefficients.center(),
                              parts ? partial.data() : out_g,
                              parts ? partial.data() + units * row : out_gx,
                              c,
                              row,
                              c * s,
                              blocks,
                              block_rows};
  const int64_t unit_size = channels_last ? (blocks > 1 ? block_rows * row : c * s) : row;
  torch::stable::parallel_for(0, units, kGrain / unit_size + 1,
                              [&](int64_t begin, int64_t end) { kernel.backward(p, begin, end); });
  if (parts) {
    for (int64_t i = 0; i < n * c; ++i) {
      const float* first = partial.data() + i / c * blocks * row + i % c;
      float g = 0.0f, gx = 0.0f;
      for (int64_t k = 0; k < blocks * times; ++k) {
        g += first[k * c];
        gx += first[k * c + units * row];
      }
      out_g[i] = g;
      out_gx[i] = gx;
    }
  }
  return {grad_x, grad_residual, sum_g, sum_gx};
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cpu, m) {
  m.def(
      "masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, Tensor? residual, "
      "int n, int c, int s, bool channels_last, bool relu, int isa) -> Tensor");
  m.def(
      "masked_affine_backward(Tensor grad, Tensor x, Tensor? y, Tensor mask, Tensor scale, Tensor center, "
      "Tensor shift, int n, int c, int s, bool channels_last, bool relu, bool need_grad_x, bool need_grad_residual, "
      "int isa) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cpu, CPU, m) {
  m.impl("masked_affine", TORCH_BOX(&mnp_fast::masked_affine));
  m.impl("masked_affine_backward", TORCH_BOX(&mnp_fast::masked_affine_backward));
}
