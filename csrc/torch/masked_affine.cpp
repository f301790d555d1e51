// The CPU kernels of masked_affine as torch operators. mnp_fast/ops/op_masked_affine.py holds the public op.
#include "torch/masked_affine.h"

#include <vector>

#include "cpu/masked_affine.h"
#include "torch/rows.h"

namespace mnp_fast {

namespace {

// With `signs` also what the relu lets through, one bit a number.
Tensor forward(const Tensor& x, const Tensor& mask, const Tensor& scale, const Tensor& center, const Tensor& shift,
               const std::optional<Tensor>& residual, const Layout& layout, bool relu, Tensor* signs, int64_t isa) {
  check_dense(x, layout.numel(), "x");
  if (residual.has_value()) check_like(*residual, x, "residual");
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_affine);
  const cpu::DType dtype = dtype_of(x, "x");
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;

  cpu::Rows rows = rows_of(dtype, layout);
  rows.streamed = streamed(y);
  const Coefficients coefficients(x, mask, scale, center, shift, layout.c, layout.channels_last ? rows.row : layout.c);
  const cpu::MaskedAffineForward p{rows,
                                   relu,
                                   x.const_data_ptr(),
                                   pointer(residual),
                                   y.mutable_data_ptr(),
                                   coefficients.a(),
                                   coefficients.b(),
                                   signs == nullptr ? nullptr : static_cast<uint8_t*>(signs->mutable_data_ptr())};
  for_units(rows, [&](int64_t begin, int64_t end) { kernel.forward(p, begin, end); });
  return y;
}

// Signs are kept in whole bytes, and in whole vectors of every instruction set.
void check_signs(const Layout& layout) {
  STD_TORCH_CHECK(layout.channels_last && layout.c % 16 == 0, "signs are kept of multiples of 16 channels inside");
}

// What comes back, and what is written: each of the gradients may be written over `grad`.
struct Backward {
  const Tensor& grad;
  const Tensor& x;
  const std::optional<Tensor>& y;
  const std::optional<Tensor>& signs;
  Tensor* grad_x;         // null: not needed
  Tensor* grad_residual;  // null: not needed
  bool may_stream;
};

// Returns sum_g and sum_gx.
std::tuple<Tensor, Tensor> backward(const Backward& of, const Tensor& mask, const Tensor& scale, const Tensor& center,
                                    const Tensor& shift, const Layout& layout, bool relu, int64_t isa) {
  const Tensor& x = of.x;
  check_dense(x, layout.numel(), "x");
  check_like(of.grad, x, "grad");
  if (of.y.has_value()) check_like(*of.y, x, "y");
  if (of.signs.has_value()) {
    check_signs(layout);
    check_dense(*of.signs, layout.numel() / 8, "signs");
    STD_TORCH_CHECK(of.signs->scalar_type() == ScalarType::Byte && of.signs->is_cpu(), "signs are no bytes of the CPU");
  }
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_affine);
  const cpu::DType dtype = dtype_of(x, "x");
  Tensor sum_g = torch::stable::new_empty(mask, {layout.n, layout.c});
  Tensor sum_gx = torch::stable::new_empty(mask, {layout.n, layout.c});
  if (x.numel() == 0) {
    torch::stable::zero_(sum_g);
    torch::stable::zero_(sum_gx);
    return {sum_g, sum_gx};
  }

  SampleSums sums(dtype, layout);
  sums.blocks.rows.streamed = of.may_stream && (of.grad_x == nullptr || streamed(*of.grad_x)) &&
                              (of.grad_residual == nullptr || streamed(*of.grad_residual));
  const Coefficients coefficients(x, mask, scale, center, shift, layout.c,
                                  layout.channels_last ? sums.blocks.rows.row : layout.c);
  float* out_g = static_cast<float*>(sum_g.mutable_data_ptr());
  float* out_gx = static_cast<float*>(sum_gx.mutable_data_ptr());
  std::vector<float> partial(2 * sums.partial());
  const cpu::MaskedAffineBackward p{sums.blocks,
                                    relu,
                                    of.grad.const_data_ptr(),
                                    x.const_data_ptr(),
                                    pointer(of.y),
                                    static_cast<const uint8_t*>(pointer(of.signs)),
                                    of.grad_x == nullptr ? nullptr : of.grad_x->mutable_data_ptr(),
                                    of.grad_residual == nullptr ? nullptr : of.grad_residual->mutable_data_ptr(),
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
  return {sum_g, sum_gx};
}

Tensor none_like(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

}  // namespace

Tensor masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, std::optional<Tensor> residual,
                     int64_t n, int64_t c, int64_t s, bool channels_last, bool relu, int64_t isa) {
  return forward(x, mask, scale, center, shift, residual, {n, c, s, channels_last}, relu, nullptr, isa);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_affine_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                                  Tensor mask, Tensor scale, Tensor center,
                                                                  Tensor shift, int64_t n, int64_t c, int64_t s,
                                                                  bool channels_last, bool relu, bool need_grad_x,
                                                                  bool need_grad_residual, int64_t isa) {
  Tensor grad_x = need_grad_x ? torch::stable::empty_like(x) : none_like(x);
  Tensor grad_residual = need_grad_residual ? torch::stable::empty_like(x) : none_like(x);
  const Backward of{
      grad, x, y, std::nullopt, need_grad_x ? &grad_x : nullptr, need_grad_residual ? &grad_residual : nullptr, true};
  const auto [sum_g, sum_gx] = backward(of, mask, scale, center, shift, {n, c, s, channels_last}, relu, isa);
  return {grad_x, grad_residual, sum_g, sum_gx};
}

namespace {

std::tuple<Tensor, Tensor> masked_affine_signed(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift,
                                                Tensor residual, int64_t n, int64_t c, int64_t s, bool channels_last,
                                                int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_signs(layout);
  Tensor signs = torch::stable::new_empty(x, {layout.numel() / 8}, ScalarType::Byte);
  Tensor y = forward(x, mask, scale, center, shift, residual, layout, true, &signs, isa);
  return {y, signs};
}

// As masked_affine_backward. Where `over`, what is asked for last is written over grad, and comes back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_affine_backward_(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                                   std::optional<Tensor> signs, Tensor mask,
                                                                   Tensor scale, Tensor center, Tensor shift, int64_t n,
                                                                   int64_t c, int64_t s, bool channels_last, bool relu,
                                                                   bool need_grad_x, bool need_grad_residual, bool over,
                                                                   int64_t isa) {
  const bool over_x = over && !need_grad_residual, over_residual = over && need_grad_residual;
  Tensor grad_x = need_grad_x && !over_x ? torch::stable::empty_like(x) : none_like(x);
  Tensor grad_residual = need_grad_residual && !over_residual ? torch::stable::empty_like(x) : none_like(x);
  Tensor* into_x = over_x ? &grad : &grad_x;
  Tensor* into_residual = over_residual ? &grad : &grad_residual;
  const Backward of{grad, x, y, signs, need_grad_x ? into_x : nullptr, need_grad_residual ? into_residual : nullptr,
                    !over};
  const auto [sum_g, sum_gx] = backward(of, mask, scale, center, shift, {n, c, s, channels_last}, relu, isa);
  return {grad_x, grad_residual, sum_g, sum_gx};
}

}  // namespace

}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cpu, m) {
  m.def(
      "masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, Tensor? residual, "
      "int n, int c, int s, bool channels_last, bool relu, int isa) -> Tensor");
  m.def(
      "masked_affine_signed(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, Tensor residual, "
      "int n, int c, int s, bool channels_last, int isa) -> (Tensor, Tensor)");
  m.def(
      "masked_affine_backward_(Tensor(a!) grad, Tensor x, Tensor? y, Tensor? signs, Tensor mask, Tensor scale, "
      "Tensor center, Tensor shift, int n, int c, int s, bool channels_last, bool relu, bool need_grad_x, "
      "bool need_grad_residual, bool over, int isa) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cpu, CPU, m) {
  m.impl("masked_affine", TORCH_BOX(&mnp_fast::masked_affine));
  m.impl("masked_affine_signed", TORCH_BOX(&mnp_fast::masked_affine_signed));
  m.impl("masked_affine_backward_", TORCH_BOX(&mnp_fast::masked_affine_backward_));
}
