// What the CUDA kernels of every op share: 16-byte accesses, float32 arithmetic on narrow numbers, the device to run
// on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

namespace mnp_fast::cuda {

inline constexpr int kWarp = 32;

template <class T>
inline constexpr int kPerAccess = 16 / sizeof(T);

// V numbers that are read and written in one access; the address must be a multiple of their size.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <class T, int V>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Null pointers count as aligned: they are not read.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The device for the launches of one call. This library's runtime is its own copy, which does not follow torch's.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// run(a number of the op's dtype), whose code it returns, on the op's device.
template <class Op, class Run>
int typed(const Op& p, Run run) {
  const DeviceScope scope(p.device);
  if (scope.status() != cudaSuccess) return scope.status();
  switch (p.dtype) {
    case kMnpFloat32:
      return run(float{});
    case kMnpBFloat16:
      return run(__nv_bfloat16{});
    case kMnpFloat16:
      return run(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace mnp_fast::cuda
