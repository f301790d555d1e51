// Bytes moved for each neuron: 24, four numbers read and two written. Masks are few, and the launch costs more than the
// memory. Every product and sum is rounded, as in the other backends: the same bits everywhere.
#include "cuda/common.cuh"
#include "cuda/mask_step.h"

namespace mnp_fast::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void step_one(const MnpMaskStep& p, float grad, float magnitude, float& momentum,
                                         float& mask) {
  // Intrinsics, which the compiler does not fuse.
  momentum = __fadd_rn(__fadd_rn(__fmul_rn(p.decay, momentum), grad), __fmul_rn(p.penalty, magnitude));
  mask = __fsub_rn(mask, __fmul_rn(p.rate, momentum));
  // Written so that NaN stays NaN.
  mask = mask < 0.0f ? 0.0f : mask;
  mask = mask > 1.0f ? 1.0f : mask;
}

template <int V>
__global__ void __launch_bounds__(kThreads) step(const MnpMaskStep p) {
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (start >= p.n) return;
  if (p.n - start >= V) {
    Pack<float, V> mask = load<float, V>(p.mask + start), momentum = load<float, V>(p.momentum + start);
    const Pack<float, V> grad = load<float, V>(p.grad + start), magnitude = load<float, V>(p.magnitude + start);
#pragma unroll
    for (int k = 0; k < V; ++k) step_one(p, grad.v[k], magnitude.v[k], momentum.v[k], mask.v[k]);
    store<float, V>(p.momentum + start, momentum);
    store<float, V>(p.mask + start, mask);
  } else {
    for (int64_t i = start; i < p.n; ++i) step_one(p, p.grad[i], p.magnitude[i], p.momentum[i], p.mask[i]);
  }
}

template <int V>
int launch(const MnpMaskStep& p) {
  const auto blocks = static_cast<unsigned int>(ceil_div(ceil_div(p.n, V), kThreads));
  step<V><<<blocks, kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace mnp_fast::cuda

extern "C" int mnp_mask_step(const MnpMaskStep* p) {
  using namespace mnp_fast::cuda;
  const DeviceScope scope(p->device);
  if (scope.status() != cudaSuccess) return scope.status();
  if (p->n == 0) return cudaSuccess;
  const bool wide = aligned(p->mask) && aligned(p->momentum) && aligned(p->grad) && aligned(p->magnitude);
  return wide ? launch<kPerAccess<float>>(*p) : launch<1>(*p);
}
