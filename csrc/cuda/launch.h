// What the C launchers of every op share. Pointers are device memory unless they say otherwise, tensors are dense. A
// launcher returns a CUDA error code, 0 for success; it waits for nothing, and it neither prints nor exits. Sums are
// added in an order that depends on sizes and alignment alone.
#pragma once

#include <cstdint>

extern "C" {

enum MnpDType { kMnpFloat32 = 0, kMnpBFloat16 = 1, kMnpFloat16 = 2 };

const char* mnp_cuda_error_string(int code);
}
