// The CPU kernel of 3x3 convolutions as a torch operator; mnp_fast/ops/winograd.py says when it runs.
#include "cpu/winograd.h"

#include <cstdlib>
#include <memory>

#include "torch/cpu.h"

namespace mnp_fast {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
// Memory that nothing has been written to yet.
using Space = std::unique_ptr<float, Free>;

}  // namespace

Tensor winograd(Tensor x, Tensor u, int64_t out, int64_t pad_h, int64_t pad_w, int64_t isa) {
  STD_TORCH_CHECK(x.dim() == 4, "x has ", x.dim(), " dimensions instead of 4");
  const int64_t n = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(dtype_of(x, "x") == cpu::DType::float32, "x is not float32");
  STD_TORCH_CHECK(pad_h >= 0 && pad_w >= 0 && height + 2 * pad_h >= 3 && width + 2 * pad_w >= 3,
                  "x is smaller than the filter");
  STD_TORCH_CHECK(
      x.numel() == 0 || ((in == 1 || x.stride(1) == 1) && (width == 1 || x.stride(3) == in) &&
                         (height == 1 || x.stride(2) == width * in) && (n == 1 || x.stride(0) == height * width * in)),
      "x is not channels_last");
  cpu::Winograd p{};
  p.in = in, p.out = out, p.height = height, p.width = width, p.pad_h = pad_h, p.pad_w = pad_w;
  p.out_h = height + 2 * pad_h - 2, p.out_w = width + 2 * pad_w - 2;
  p.tiles_h = (p.out_h + cpu::kTile - 1) / cpu::kTile, p.tiles_w = (p.out_w + cpu::kTile - 1) / cpu::kTile;
  STD_TORCH_CHECK(out > 0, "there are no channels to compute");
  p.u = check_vector(u, cpu::kTilePoints * p.panels() * in * cpu::kPanel, x, "u");
  const auto& kernel = MNP_CHOOSE_KERNELS(usable_isa(isa), winograd);

  Tensor y = torch::stable::transpose(
      torch::stable::transpose(torch::stable::new_empty(x, {n, p.out_h, p.out_w, out}), 2, 3), 1, 2);
  if (y.numel() == 0) return y;
  if (x.numel() == 0) return torch::stable::zero_(y);
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.y = static_cast<float*>(y.mutable_data_ptr());
  const int64_t tiles = n * p.tiles_h * p.tiles_w, blocks = (tiles + p.at_once() - 1) / p.at_once();
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Space space(static_cast<float*>(std::aligned_alloc(64, p.workspace() * sizeof(float))));
    STD_TORCH_CHECK(space != nullptr, "no memory for ", p.workspace(), " numbers");
    for (int64_t block = begin; block < end; ++block) {
      // Blocks of one size: no thread waits for another's rest.
      kernel.run(p, block * tiles / blocks, (block + 1) * tiles / blocks, space.get());
    }
  });
  return y;
}

}  // namespace mnp_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mnp_fast_cpu, m) {
  m.def("winograd(Tensor x, Tensor u, int out, int pad_h, int pad_w, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mnp_fast_cpu, CPU, m) { m.impl("winograd", TORCH_BOX(&mnp_fast::winograd)); }
