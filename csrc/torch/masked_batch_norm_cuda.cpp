// The CUDA kernels of masked_batch_norm as torch operators. mnp_fast/ops/op_masked_batch_norm.py holds the public op.
#include "cuda/masked_batch_norm.h"
#include "torch/masked_affine.h"
#include "torch/masked_affine_cuda.h"

namespace mnp_fast {
namespace {

Tensor vector_like(const Tensor& tensor, int64_t numel) { return torch::stable::new_empty(tensor, {numel}); }

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> masked_batch_norm(Tensor x, Tensor mask, Tensor weight, Tensor bias,
                                                     std::optional<Tensor> residual, int64_t n, int64_t c, int64_t s,
                                                     bool channels_last, double eps, bool relu, int64_t stream) {
  Tensor mean = vector_like(mask, c), rstd = vector_like(mask, c), scale = vector_like(mask, c);
  MnpBatchNormStatistics p{};
  p.affine = affine(x, mask, scale, mean, bias, {n, c, s, channels_last}, relu, stream);
  STD_TORCH_CHECK(x.numel() > 0, "x is empty");
  Tensor partial = vector_like(mask, mnp_masked_batch_norm_partial(n, c, s, channels_last));
  p.x = x.const_data_ptr();
  p.weight = check_vector(weight, c, x, "weight");
  p.eps = eps;
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  p.scale = floats(scale);
  p.partial = floats(partial);
  check_launch(mnp_masked_batch_norm_statistics(&p));
  return {masked_affine(x, mask, scale, mean, bias, residual, n, c, s, channels_last, relu, stream), mean, rstd};
}

// scale = weight * rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_batch_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                                      Tensor mask, Tensor scale, Tensor bias,
                                                                      Tensor mean, Tensor rstd, int64_t n, int64_t c,
                                                                      int64_t s, bool channels_last, bool relu,
                                                                      bool need_grad_x, bool need_grad_residual,
                                                                      int64_t stream) {
  STD_TORCH_CHECK(x.numel() > 0, "x is empty");
  auto [grad_x, grad_residual, sum_g, sum_gx] = masked_affine_backward(
      grad, x, y, mask, scale, mean, bias, n, c, s, channels_last, relu, false, need_grad_residual, stream);
  if (need_grad_x) grad_x = torch::stable::empty_like(x);
  Tensor slope = vector_like(mask, c), offset = vector_like(mask, c);
  MnpBatchNormGradX p{};
  // The gradient behind the activation is read where it has been written, and made again where it has not.
  const bool again = relu && !need_grad_residual;
  p.affine = affine(x, mask, scale, mean, bias, {n, c, s, channels_last}, again, stream);
  p.grad = need_grad_residual ? grad_residual.const_data_ptr() : grad.const_data_ptr();
  p.x = x.const_data_ptr();
  p.y = again ? pointer(y) : nullptr;
  p.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  p.rstd = check_vector(rstd, c, x, "rstd");
  p.sum_g = static_cast<const float*>(sum_g.const_data_ptr());
  p.sum_gx = floats(sum_gx);
  p.slope = floats(slope);
  p.offset = floats(offset);
  check_launch(mnp_masked_batch_norm_grad_x(&p));
  return {grad_x, grad_residual, sum_g, sum_gx};
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cuda, m) {
  m.def(
      "masked_batch_norm(Tensor x, Tensor mask, Tensor weight, Tensor bias, Tensor? residual, int n, int c, int s, "
      "bool channels_last, float eps, bool relu, int stream) -> (Tensor, Tensor, Tensor)");
  m.def(
      "masked_batch_norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor mask, Tensor scale, Tensor bias, "
      "Tensor mean, Tensor rstd, int n, int c, int s, bool channels_last, bool relu, bool need_grad_x, "
      "bool need_grad_residual, int stream) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cuda, CUDA, m) {
  m.impl("masked_batch_norm", TORCH_BOX(&mnp_fast::masked_batch_norm));
  m.impl("masked_batch_norm_backward", TORCH_BOX(&mnp_fast::masked_batch_norm_backward));
}
