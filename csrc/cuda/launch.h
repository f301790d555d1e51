// What the C launchers of every op share.
//
// All pointers are device memory unless they say otherwise. A launcher returns a CUDA error code, 0 for success; it
// waits for nothing, and it neither prints nor exits.
#pragma once

#include <cstdint>

extern "C" {

enum MnpDType { kMnpFloat32 = 0, kMnpBFloat16 = 1, kMnpFloat16 = 2 };

const char* mnp_cuda_error_string(int code);
}
