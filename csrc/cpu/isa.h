// Instruction sets that the CPU kernels are built for, and the choice between them at run time.
#pragma once

#include <cstdint>

namespace mnp_fast::cpu {

enum class Isa : int64_t { scalar = 0, avx2 = 1, avx512 = 2 };
inline constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512"};
inline constexpr int64_t kIsaCount = 3;

// Built into this library, and this processor and operating system can run it.
bool isa_usable(Isa isa);

// The table of kernels of one op for `isa`, which must be usable.
template <class Table>
const Table& choose([[maybe_unused]] Isa isa, const Table* scalar, [[maybe_unused]] const Table* avx2,
                    [[maybe_unused]] const Table* avx512) {
  if (isa == Isa::avx512) return *avx512;
  if (isa == Isa::avx2) return *avx2;
  return *scalar;
}

}  // namespace mnp_fast::cpu

// Kernel tables of an op: one definition for each instruction set, in a namespace of its own.
#ifdef MNP_X86
#define MNP_DECLARE_KERNELS(Table, name) \
  namespace scalar {                     \
  extern const Table name;               \
  }                                      \
  namespace avx2 {                       \
  extern const Table name;               \
  }                                      \
  namespace avx512 {                     \
  extern const Table name;               \
  }
#define MNP_CHOOSE_KERNELS(isa, name)                                                        \
  ::mnp_fast::cpu::choose(isa, &::mnp_fast::cpu::scalar::name, &::mnp_fast::cpu::avx2::name, \
                          &::mnp_fast::cpu::avx512::name)
#else
#define MNP_DECLARE_KERNELS(Table, name) \
  namespace scalar {                     \
  extern const Table name;               \
  }
#define MNP_CHOOSE_KERNELS(isa, name)                                                          \
  ::mnp_fast::cpu::choose(isa, &::mnp_fast::cpu::scalar::name, &::mnp_fast::cpu::scalar::name, \
                          &::mnp_fast::cpu::scalar::name)
#endif
