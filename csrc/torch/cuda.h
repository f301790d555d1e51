// What the CUDA glue of every op needs: arguments of the launchers, and their error codes as exceptions.
#pragma once

#include "cuda/masked_affine.h"
#include "torch/common.h"

namespace mnp_fast {

inline void check_launch(int code) { STD_TORCH_CHECK(code == 0, "CUDA launch failed: ", mnp_cuda_error_string(code)); }

inline MnpAffine affine(const Tensor& x, const Tensor& mask, const Tensor& scale, const Tensor& center,
                        const Tensor& shift, const Layout& layout, bool relu, int64_t stream) {
  check_dense(x, layout.numel(), "x");
  STD_TORCH_CHECK(x.is_cuda(), "x is not on a CUDA device");
  MnpAffine p{};
  p.n = layout.n;
  p.c = layout.c;
  p.s = layout.s;
  p.channels_last = layout.channels_last;
  p.relu = relu;
  if (x.scalar_type() == ScalarType::Float) {
    p.dtype = kMnpFloat32;
  } else if (x.scalar_type() == ScalarType::BFloat16) {
    p.dtype = kMnpBFloat16;
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "x is none of float32, bfloat16 and float16");
    p.dtype = kMnpFloat16;
  }
  p.device = x.get_device_index();
  p.stream = reinterpret_cast<void*>(stream);
  p.mask = check_vector(mask, layout.c, x, "mask");
  p.scale = check_vector(scale, layout.c, x, "scale");
  p.center = check_vector(center, layout.c, x, "center");
  p.shift = check_vector(shift, layout.c, x, "shift");
  return p;
}

}  // namespace mnp_fast
