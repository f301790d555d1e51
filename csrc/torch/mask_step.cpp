// The CPU kernel of mask_step as a torch operator. mnp_fast/ops/op_mask_step.py holds the public op.
#include "cpu/mask_step.h"

#include "torch/cpu.h"

namespace mnp_fast {
namespace {

void mask_step(Tensor mask, Tensor momentum, Tensor grad, Tensor magnitude, double rate, double decay, double penalty,
               int64_t isa) {
  const int64_t n = mask.numel();
  STD_TORCH_CHECK(mask.is_cpu(), "mask is not on the CPU");
  check_vector(mask, n, mask, "mask");
  check_vector(momentum, n, mask, "momentum");
  const cpu::MaskStep p{static_cast<float*>(mask.mutable_data_ptr()),
                        static_cast<float*>(momentum.mutable_data_ptr()),
                        check_vector(grad, n, mask, "grad"),
                        check_vector(magnitude, n, mask, "magnitude"),
                        static_cast<float>(rate),
                        static_cast<float>(decay),
                        static_cast<float>(penalty)};
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), mask_step);
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) { kernel.step(p, begin, end); });
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cpu, m) {
  m.def(
      "mask_step(Tensor(a!) mask, Tensor(b!) momentum, Tensor grad, Tensor magnitude, float rate, float decay, "
      "float penalty, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cpu, CPU, m) { m.impl("mask_step", TORCH_BOX(&mnp_fast::mask_step)); }
