// The CPU kernels of masked_act as torch operators. mnp_fast/ops/op_masked_act.py holds the public op.
#include "cpu/masked_act.h"

#include <tuple>
#include <vector>

#include "torch/rows.h"

namespace mnp_fast {
namespace {

// The mask once, or repeated to `entries` numbers.
class RepeatedMask {
 public:
  RepeatedMask(const Tensor& x, const Tensor& mask, int64_t channels, int64_t entries)
      : mask_(check_vector(mask, channels, x, "mask")) {
    if (entries == channels) return;
    repeated_.resize(entries);
    for (int64_t i = 0; i < entries; ++i) repeated_[i] = mask_[i % channels];
    mask_ = repeated_.data();
  }
  const float* data() const { return mask_; }

 private:
  const float* mask_;
  std::vector<float> repeated_;
};

Tensor masked_act(Tensor x, Tensor mask, int64_t n, int64_t c, int64_t s, bool channels_last, int64_t act,
                  int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_dense(x, layout.numel(), "x");
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_act);
  const cpu::DType dtype = dtype_of(x, "x");
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;

  cpu::Rows rows = rows_of(dtype, layout);
  rows.streamed = streamed(y);
  const RepeatedMask repeated(x, mask, c, channels_last ? rows.row : c);
  const cpu::MaskedActForward p{rows, check_act(act), x.const_data_ptr(), y.mutable_data_ptr(), repeated.data()};
  for_units(rows, [&](int64_t begin, int64_t end) { kernel.forward(p, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> masked_act_backward(Tensor grad, Tensor x, Tensor mask, int64_t n, int64_t c, int64_t s,
                                               bool channels_last, int64_t act, bool need_grad_x, int64_t isa) {
  const Layout layout{n, c, s, channels_last};
  check_dense(x, layout.numel(), "x");
  check_like(grad, x, "grad");
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), masked_act);
  const cpu::DType dtype = dtype_of(x, "x");
  Tensor grad_x = need_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor sum_gact = torch::stable::new_empty(mask, {n, c});
  if (x.numel() == 0) {
    torch::stable::zero_(sum_gact);
    return {grad_x, sum_gact};
  }

  SampleSums sums(dtype, layout);
  sums.blocks.rows.streamed = need_grad_x && streamed(grad_x);
  const RepeatedMask repeated(x, mask, c, channels_last ? sums.blocks.rows.row : c);
  float* out = static_cast<float*>(sum_gact.mutable_data_ptr());
  std::vector<float> partial(sums.partial());
  const cpu::MaskedActBackward p{sums.blocks,
                                 check_act(act),
                                 grad.const_data_ptr(),
                                 x.const_data_ptr(),
                                 need_grad_x ? grad_x.mutable_data_ptr() : nullptr,
                                 repeated.data(),
                                 sums.in_parts() ? partial.data() : out};
  sums.for_units([&](int64_t begin, int64_t end) { kernel.backward(p, begin, end); });
  if (sums.in_parts()) sums.add(partial.data(), out);
  return {grad_x, sum_gact};
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cpu, m) {
  m.def("masked_act(Tensor x, Tensor mask, int n, int c, int s, bool channels_last, int act, int isa) -> Tensor");
  m.def(
      "masked_act_backward(Tensor grad, Tensor x, Tensor mask, int n, int c, int s, bool channels_last, int act, "
      "bool need_grad_x, int isa) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cpu, CPU, m) {
  m.impl("masked_act", TORCH_BOX(&mnp_fast::masked_act));
  m.impl("masked_act_backward", TORCH_BOX(&mnp_fast::masked_act_backward));
}
