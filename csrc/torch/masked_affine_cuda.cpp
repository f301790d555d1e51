// The CUDA kernels of masked_affine as torch operators. mnp_fast/ops/op_masked_affine.py holds the public op.
#include <string>
#include <tuple>

#include "cuda/masked_affine.h"
#include "torch/common_cuda.h"

namespace mnp_fast {
namespace {

MnpAffine affine(const Tensor& x, const Tensor& mask, const Tensor& scale, const Tensor& center, const Tensor& shift,
                 const Layout& layout, bool relu, int64_t stream) {
  check_dense(x, layout.numel(), "x");
  MnpAffine p{};
  p.n = layout.n;
  p.c = layout.c;
  p.s = layout.s;
  p.channels_last = layout.channels_last;
  p.relu = relu;
  p.dtype = dtype_of(x, "x");
  p.device = x.get_device_index();
  p.stream = reinterpret_cast<void*>(stream);
  p.mask = check_vector(mask, layout.c, x, "mask");
  p.scale = check_vector(scale, layout.c, x, "scale");
  p.center = check_vector(center, layout.c, x, "center");
  p.shift = check_vector(shift, layout.c, x, "shift");
  return p;
}

Tensor masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, std::optional<Tensor> residual,
                     int64_t n, int64_t c, int64_t s, bool channels_last, bool relu, int64_t stream) {
  MnpAffineForward p{};
  p.affine = affine(x, mask, scale, center, shift, {n, c, s, channels_last}, relu, stream);
  if (residual.has_value()) check_like(*residual, x, "residual");
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.residual = pointer(residual);
  p.y = y.mutable_data_ptr();
  check_launch(mnp_masked_affine_forward(&p));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_affine_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                                  Tensor mask, Tensor scale, Tensor center,
                                                                  Tensor shift, int64_t n, int64_t c, int64_t s,
                                                                  bool channels_last, bool relu, bool need_grad_x,
                                                                  bool need_grad_residual, int64_t stream) {
  MnpAffineBackward p{};
  p.affine = affine(x, mask, scale, center, shift, {n, c, s, channels_last}, relu, stream);
  check_like(grad, x, "grad");
  if (y.has_value()) check_like(*y, x, "y");
  Tensor grad_x = need_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_residual = need_grad_residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor sum_g = torch::stable::new_empty(mask, {n, c});
  Tensor sum_gx = torch::stable::new_empty(mask, {n, c});
  if (x.numel() == 0) {
    torch::stable::zero_(sum_g);
    torch::stable::zero_(sum_gx);
    return {grad_x, grad_residual, sum_g, sum_gx};
  }
  Tensor partial = torch::stable::new_empty(mask, {mnp_masked_affine_partial(n, c, s, channels_last)});
  p.grad = grad.const_data_ptr();
  p.x = x.const_data_ptr();
  p.y = pointer(y);
  p.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_residual = need_grad_residual ? grad_residual.mutable_data_ptr() : nullptr;
  p.sum_g = static_cast<float*>(sum_g.mutable_data_ptr());
  p.sum_gx = static_cast<float*>(sum_gx.mutable_data_ptr());
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  check_launch(mnp_masked_affine_backward(&p));
  return {grad_x, grad_residual, sum_g, sum_gx};
}

// Empty if the kernels can run on the device, else what the CUDA runtime says.
std::string device_problem(int64_t device) {
  const int code = mnp_masked_affine_check(static_cast<int32_t>(device));
  return code == 0 ? "" : mnp_cuda_error_string(code);
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cuda, m) {
  m.def(
      "masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, Tensor? residual, "
      "int n, int c, int s, bool channels_last, bool relu, int stream) -> Tensor");
  m.def(
      "masked_affine_backward(Tensor grad, Tensor x, Tensor? y, Tensor mask, Tensor scale, Tensor center, "
      "Tensor shift, int n, int c, int s, bool channels_last, bool relu, bool need_grad_x, bool need_grad_residual, "
      "int stream) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("device_problem(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cuda, CUDA, m) {
  m.impl("masked_affine", TORCH_BOX(&mnp_fast::masked_affine));
  m.impl("masked_affine_backward", TORCH_BOX(&mnp_fast::masked_affine_backward));
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("device_problem", TORCH_BOX(&mnp_fast::device_problem));
}
