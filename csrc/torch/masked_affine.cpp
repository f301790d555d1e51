// The CPU kernels of masked_affine as torch operators. mnp_fast/ops/op_masked_affine.py holds the public op.
#include "torch/masked_affine.h"

#include <vector>

#include "cpu/masked_affine.h"
#include "torch/rows.h"

namespace mnp_fast {

Tensor masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, std::optional<Tensor> residual,
                     int64_t n, int64_t c, int64_t s, bool channels_last, bool relu, int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_dense(x, layout.numel(), "x");
  if (residual.has_value()) check_like(*residual, x, "residual");
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_affine);
  const cpu::DType dtype = dtype_of(x, "x");
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;

  cpu::Rows rows = rows_of(dtype, layout);
  rows.streamed = streamed(y);
  const Coefficients coefficients(x, mask, scale, center, shift, c, channels_last ? rows.row : c);
  const cpu::MaskedAffineForward p{
      rows, relu, x.const_data_ptr(), pointer(residual), y.mutable_data_ptr(), coefficients.a(), coefficients.b()};
  for_units(rows, [&](int64_t begin, int64_t end) { kernel.forward(p, begin, end); });
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
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_affine);
  const cpu::DType dtype = dtype_of(x, "x");
  Tensor grad_x = need_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_residual = need_grad_residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor sum_g = torch::stable::new_empty(mask, {n, c});
  Tensor sum_gx = torch::stable::new_empty(mask, {n, c});
  if (x.numel() == 0) {
    torch::stable::zero_(sum_g);
    torch::stable::zero_(sum_gx);
    return {grad_x, grad_residual, sum_g, sum_gx};
  }

  SampleSums sums(dtype, layout);
  sums.blocks.rows.streamed = (!need_grad_x || streamed(grad_x)) && (!need_grad_residual || streamed(grad_residual));
  const Coefficients coefficients(x, mask, scale, center, shift, c, channels_last ? sums.blocks.rows.row : c);
  float* out_g = static_cast<float*>(sum_g.mutable_data_ptr());
  float* out_gx = static_cast<float*>(sum_gx.mutable_data_ptr());
  std::vector<float> partial(2 * sums.partial());
  const cpu::MaskedAffineBackward p{sums.blocks,
                                    relu,
                                    grad.const_data_ptr(),
                                    x.const_data_ptr(),
                                    pointer(y),
                                    need_grad_x ? grad_x.mutable_data_ptr() : nullptr,
                                    need_grad_residual ? grad_residual.mutable_data_ptr() : nullptr,
                                    coefficients.a(),
                                    coefficients.b(),
                                    coefficients.center(),
                                    sums.in_parts() ? partial.data() : out_g,
                                    sums.in_parts() ? partial.data() + sums.partial() : out_gx};
  sums.for_units([&](int64_t begin, int64_t end) { kernel.backward(p, begin, end); });
  if (sums.in_parts()) {
    sums.add(partial.data(), out_g);
    sums.add(partial.data() + sums.partial(), out_gx);
  }
  return {grad_x, grad_residual, sum_g, sum_gx};
}

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
