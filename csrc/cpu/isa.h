// Instruction sets that the CPU kernels are built for, and the choice between them at run time.
#pragma once

#include <cstdint>

namespace mnp_fast::cpu {

enum class Isa : int64_t { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
inline constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
inline constexpr int64_t kIsaCount = 4;

// Built into this library, and this processor and operating system can run it.
bool isa_usable(Isa isa);

// The table of kernels of one op for `isa`, which must be usable; tables are in the order of Isa.
template <class Table, class... More>
const Table& choose(Isa isa, const Table* scalar, const More*... wider) {
  const Table* const tables[] = {scalar, wider...};
  return *tables[static_cast<int64_t>(isa)];
}

}  // namespace mnp_fast::cpu

// Kernel tables of an op: one definition for each instruction set, in a namespace of its own.
#define MNP_DECLARE_TABLE(isa, Table, name) \
  namespace isa {                           \
  extern const Table name;                  \
  }
#ifdef MNP_X86
#define MNP_DECLARE_KERNELS(Table, name) \
  MNP_DECLARE_TABLE(scalar, Table, name) \
  MNP_DECLARE_TABLE(avx2, Table, name)   \
  MNP_DECLARE_TABLE(avx512, Table, name) \
  MNP_DECLARE_TABLE(avx512_bf16, Table, name)
#define MNP_CHOOSE_KERNELS(isa, name)                                                        \
  ::mnp_fast::cpu::choose(isa, &::mnp_fast::cpu::scalar::name, &::mnp_fast::cpu::avx2::name, \
                          &::mnp_fast::cpu::avx512::name, &::mnp_fast::cpu::avx512_bf16::name)
#else
#define MNP_DECLARE_KERNELS(Table, name) MNP_DECLARE_TABLE(scalar, Table, name)
#define MNP_CHOOSE_KERNELS(isa, name) ::mnp_fast::cpu::choose(isa, &::mnp_fast::cpu::scalar::name)
#endif
