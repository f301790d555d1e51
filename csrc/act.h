// Activations, in the order of ACTIVATIONS in mnp_fast/ops/op_masked_act.py.
//
// Each is max(x, 0) - a*Q(a) with a = |x|, and its derivative 0.5 + sign(x)*(0.5 + a*D(a) - Q(a)) with D = -Q': no sum
// loses digits or overflows, and an infinite x gives the limit where a is bounded by what makes a*Q(a) vanish.
//   gelu        Q(a) = erfc(a/sqrt(2)) / 2         gelu_tanh   Q(a) = 1/(1 + exp(2*sqrt(2/pi)*(a + 0.044715*a^3)))
//   relu        Q(a) = 0                           silu        Q(a) = 1/(1 + exp(a))
//   quick_gelu  Q(a) = 1/(1 + exp(1.702*a))
#pragma once

#include <cstdint>

namespace mnp_fast {

enum class Act : int64_t { gelu = 0, gelu_tanh = 1, relu = 2, silu = 3, quick_gelu = 4 };
inline constexpr int64_t kActCount = 5;

// Where a*Q(a) ends: it is nearly zero there (at most 3e-7 as it is computed), and exp stays normal.
inline constexpr float kGeluLimit = 6.0f, kGeluTanhLimit = 9.0f, kSiluLimit = 80.0f, kQuickGeluLimit = 48.0f;

}  // namespace mnp_fast

// erfcx(a/sqrt(2))/2 for 0 <= a <= 6 as the powers of a, a^0 first: a fit of Q(a) and a*Q(a), both within 1.6e-7 with
// float32 arithmetic. A macro, as device code cannot read an array of the host's.
#define MNP_NORMAL_TAIL                                                                                             \
  0.5f, -0.398935586f, 0.249891609f, -0.132374808f, 0.0608182028f, -0.0238780063f, 0.00761173666f, -0.00182766607f, \
      0.000301101449f, -2.97328206e-05f, 1.3099027e-06f
