// The CUDA kernel of mask_step as a torch operator. mnp_fast/ops/op_mask_step.py holds the public op.
#include "cuda/mask_step.h"
#include "torch/cuda.h"

namespace mnp_fast {
namespace {

void mask_step(Tensor mask, Tensor momentum, Tensor grad, Tensor magnitude, double rate, double decay, double penalty,
               int64_t stream) {
  const int64_t n = mask.numel();
  STD_TORCH_CHECK(mask.is_cuda(), "mask is not on a CUDA device");
  check_vector(mask, n, mask, "mask");
  check_vector(momentum, n, mask, "momentum");
  const MnpMaskStep p{static_cast<float*>(mask.mutable_data_ptr()),
                      static_cast<float*>(momentum.mutable_data_ptr()),
                      check_vector(grad, n, mask, "grad"),
                      check_vector(magnitude, n, mask, "magnitude"),
                      n,
                      static_cast<float>(rate),
                      static_cast<float>(decay),
                      static_cast<float>(penalty),
                      mask.get_device_index(),
                      reinterpret_cast<void*>(stream)};
  check_launch(mnp_mask_step(&p));
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cuda, m) {
  m.def(
      "mask_step(Tensor(a!) mask, Tensor(b!) momentum, Tensor grad, Tensor magnitude, float rate, float decay, "
      "float penalty, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cuda, CUDA, m) { m.impl("mask_step", TORCH_BOX(&mnp_fast::mask_step)); }
