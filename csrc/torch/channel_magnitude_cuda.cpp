// The CUDA kernels of channel_magnitude as a torch operator. mnp_fast/ops/op_channel_magnitude.py holds the public op.
#include <vector>

#include "cuda/channel_magnitude.h"
#include "torch/cuda.h"

namespace mnp_fast {
namespace {

Tensor channel_magnitude(std::vector<Tensor> weights, int64_t stream) {
  const int64_t rows = check_rows(weights);
  STD_TORCH_CHECK(rows < (int64_t{1} << 31), "weights have ", rows, " rows, more than a launch has blocks");
  const Tensor& like = weights[0];
  const MnpDType dtype = dtype_of(like, "weights");
  Tensor out = torch::stable::new_empty(like, {3, rows}, ScalarType::Float);
  std::vector<MnpMagnitudeRows> tensors;
  tensors.reserve(weights.size());
  for (const Tensor& weight : weights) {
    const int64_t count = weight.size(0);
    tensors.push_back({weight.const_data_ptr(), count, count > 0 ? weight.numel() / count : 0});
  }
  const MnpChannelMagnitude p{tensors.data(),
                              static_cast<int64_t>(tensors.size()),
                              rows,
                              dtype,
                              like.get_device_index(),
                              reinterpret_cast<void*>(stream),
                              static_cast<float*>(out.mutable_data_ptr())};
  check_launch(mnp_channel_magnitude(&p));
  return out;
}

}  // namespace
}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cuda, m) { m.def("channel_magnitude(Tensor[] weights, int stream) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cuda, CUDA, m) {
  m.impl("channel_magnitude", TORCH_BOX(&mnp_fast::channel_magnitude));
}
