// The glue of masked_affine, for ops that are made of it. Each device's library has its own; `target` is the
// instruction set on the CPU, the stream in CUDA.
#pragma once

#include <tuple>

#include "torch/common.h"

namespace mnp_fast {

Tensor masked_affine(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, std::optional<Tensor> residual,
                     int64_t n, int64_t c, int64_t s, bool channels_last, bool relu, int64_t target);

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_affine_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                                  Tensor mask, Tensor scale, Tensor center,
                                                                  Tensor shift, int64_t n, int64_t c, int64_t s,
                                                                  bool channels_last, bool relu, bool need_grad_x,
                                                                  bool need_grad_residual, int64_t target);

}  // namespace mnp_fast
