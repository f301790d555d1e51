#include "cpu/isa.h"

namespace mnp_fast::cpu {

bool isa_usable(Isa isa) {
#ifdef MNP_X86
  // These builtins also ask whether the operating system saves the wider registers.
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_avx2;
  static const bool has_avx512_bf16 = __builtin_cpu_supports("avx512bf16") && has_avx512;
  if (isa == Isa::avx512_bf16) return has_avx512_bf16;
  if (isa == Isa::avx512) return has_avx512;
  if (isa == Isa::avx2) return has_avx2;
#endif
  return isa == Isa::scalar;
}

}  // namespace mnp_fast::cpu
