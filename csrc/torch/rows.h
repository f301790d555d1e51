// What the CPU glue of ops with one coefficient a channel needs: memory cut into rows, coefficients repeated along
// them.
#pragma once

#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "cpu/masked_affine.h"
#include "torch/common.h"

namespace mnp_fast {

// As much as one thread should get at least: what at::parallel_for takes for its own elementwise kernels.
inline constexpr int64_t kGrain = 32768;
// Numbers in a unit of sums where channels are inside: fixed, so that sums do not depend on the threads.
inline constexpr int64_t kBlock = 65536;

inline cpu::Isa usable_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa < cpu::kIsaCount && cpu::isa_usable(static_cast<cpu::Isa>(isa)),
                  "this processor cannot run instruction set ", isa);
  return static_cast<cpu::Isa>(isa);
}

inline cpu::DType dtype_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "x is not on the CPU");
  if (x.scalar_type() == ScalarType::Float) return cpu::DType::float32;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x is neither float32 nor bfloat16");
  return cpu::DType::bfloat16;
}

// How often the channels are repeated in a row: enough for whole vectors where there are few channels, at most `most`.
inline int64_t repeats(int64_t channels, int64_t most) {
  constexpr int64_t kVector = 16;
  int64_t times = kVector / std::gcd(channels, kVector);
  if (channels * times > 4096) return 1;
  while (channels * times < 64) times *= 2;
  return times <= most ? times : 1;
}

// a, b and center, each repeated to one row.
struct Coefficients {
  std::vector<float> values;
  int64_t row;

  Coefficients(const Tensor& x, const Tensor& mask, const Tensor& scale, const Tensor& center, const Tensor& shift,
               int64_t channels, int64_t times)
      : values(3 * channels * times), row(channels * times) {
    const float* m = check_vector(mask, channels, x, "mask");
    const float* s = check_vector(scale, channels, x, "scale");
    const float* mean = check_vector(center, channels, x, "center");
    const float* t = check_vector(shift, channels, x, "shift");
    for (int64_t i = 0; i < row; ++i) {
      const int64_t c = i % channels;
      const float a = m[c] * s[c];
      values[i] = a;
      // Rounded once: where a*center is large, what is left of a*x + b is small.
      values[row + i] = static_cast<float>(t[c] - static_cast<double>(a) * mean[c]);
      values[2 * row + i] = mean[c];
    }
  }
  const float* a() const { return values.data(); }
  const float* b() const { return values.data() + row; }
  const float* center() const { return values.data() + 2 * row; }
};

}  // namespace mnp_fast
