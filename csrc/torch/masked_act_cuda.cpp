// The CUDA kernels of masked_act as torch operators. mnp_fast/ops/op_masked_act.py holds the public op.
#include <tuple>

#include "cuda/masked_act.h"
#include "torch/cuda.h"

namespace mnp_fast {
namespace {

MnpAct arguments(const Tensor& x, const Tensor& mask, const Layout& layout, int64_t act, int64_t stream) {
  check_dense(x, layout.numel(), "x");
  MnpAct p{};
  p.n = layout.n;
  p.c = layout.c;
  p.s = layout.s;
  p.channels_last = layout.channels_last;
  p.act = static_cast<int64_t>(check_act(act));
  p.dtype = dtype_of(x, "x");
  p.device = x.get_device_index();
  p.stream = reinterpret_cast<void*>(stream);
  p.mask = check_vector(mask, layout.c, x, "mask");
  return p;
}

Tensor masked_act(Tensor x, Tensor mask, int64_t n, int64_t c, int64_t s, bool channels_last, int64_t act,
                  int64_t stream) {
  MnpActForward p{};
  p.act = arguments(x, mask, {n, c, s, channels_last}, act, stream);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  check_launch(mnp_masked_act_forward(&p));
  return y;
}

std::tuple<Tensor, Tensor> masked_act_backward(Tensor grad, Tensor x, Tensor mask, int64_t n, int64_t c, int64_t s,
                                               bool channels_last, int64_t act, bool need_grad_x, int64_t stream) {
  MnpActBackward p{};
  p.act = arguments(x, mask, {n, c, s, channels_last}, act, stream);
  check_like(grad, x, "grad");
  Tensor grad_x = need_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor sum_gact = torch::stable::new_empty(mask, {n, c});
  if (x.numel() == 0) {
    torch::stable::zero_(sum_gact);
    return {grad_x, sum_gact};
  }
  Tensor partial = torch::stable::new_empty(mask, {mnp_masked_act_partial(n, c, s, channels_last)});
  p.grad = grad.const_data_ptr();
  p.x = x.const_data_ptr();
  p.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  p.sum_gact = static_cast<float*>(sum_gact.mutable_data_ptr());
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  check_launch(mnp_masked_act_backward(&p));
  return {grad_x, sum_gact};
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cuda, m) {
  m.def("masked_act(Tensor x, Tensor mask, int n, int c, int s, bool channels_last, int act, int stream) -> Tensor");
  m.def(
      "masked_act_backward(Tensor grad, Tensor x, Tensor mask, int n, int c, int s, bool channels_last, int act, "
      "bool need_grad_x, int stream) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cuda, CUDA, m) {
  m.impl("masked_act", TORCH_BOX(&mnp_fast::masked_act));
  m.impl("masked_act_backward", TORCH_BOX(&mnp_fast::masked_act_backward));
}
