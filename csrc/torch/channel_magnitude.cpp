// The CPU kernels of channel_magnitude as a torch operator. mnp_fast/ops/op_channel_magnitude.py holds the public op.
#include "cpu/channel_magnitude.h"

#include <vector>

#include "torch/cpu.h"

namespace mnp_fast {
namespace {

Tensor channel_magnitude(std::vector<Tensor> weights, int64_t isa) {
  const int64_t rows = check_rows(weights);
  const auto& kernels = MNP_CHOOSE_KERNELS(usable_isa(isa), channel_magnitude);
  const Tensor& like = weights[0];
  const bool wide = dtype_of(like, "weights") == cpu::DType::float32;
  Tensor out = torch::stable::new_empty(like, {3, rows}, ScalarType::Float);
  std::vector<cpu::MagnitudeRows> tensors;
  tensors.reserve(weights.size());
  int64_t first = 0, cost = 0;
  for (const Tensor& weight : weights) {
    const int64_t count = weight.size(0), length = count > 0 ? weight.numel() / count : 0;
    tensors.push_back({weight.const_data_ptr(), count, length, first, cost});
    first += count;
    cost += count * (length + cpu::kRowCost);
  }
  const cpu::ChannelMagnitude p{tensors.data(), static_cast<int64_t>(tensors.size()), rows,
                                static_cast<float*>(out.mutable_data_ptr())};
  torch::stable::parallel_for(0, cost, kGrain, [&](int64_t begin, int64_t end) {
    wide ? kernels.float32(p, begin, end) : kernels.bfloat16(p, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cpu, m) { m.def("channel_magnitude(Tensor[] weights, int isa) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cpu, CPU, m) {
  m.impl("channel_magnitude", TORCH_BOX(&mnp_fast::channel_magnitude));
}
