// Arguments of the CUDA kernels of masked_affine, for ops that are made of them.
#pragma once

#include "cuda/masked_affine.h"
#include "torch/cuda.h"

namespace mnp_fast {

inline MnpAffine affine(const Tensor& x, const Tensor& mask, const Tensor& scale, const Tensor& center,
                        const Tensor& shift, const Layout& layout, bool relu, int64_t stream) {
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

}  // namespace mnp_fast
