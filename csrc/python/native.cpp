// mnp_fast._native: what this build holds and what this processor can run. No tensor passes through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

namespace cpu = mnp_fast::cpu;

std::map<std::string, std::string> build_info() {
  return {{"version", MNP_VERSION},           {"compiler", MNP_COMPILER},      {"torch", MNP_TORCH_VERSION},
          {"cpu_isas", MNP_CPU_ISAS},         {"cuda", MNP_CUDA_VERSION},      {"cuda_archs", MNP_CUDA_ARCHS},
          {"torch_target", MNP_TORCH_TARGET}, {"cuda_reason", MNP_CUDA_REASON}};
}

// In order of width: the last is the best.
std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (int64_t isa = 0; isa < cpu::kIsaCount; ++isa) {
    if (cpu::isa_usable(static_cast<cpu::Isa>(isa))) names.emplace_back(cpu::kIsaNames[isa]);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information and CPU features of mnp_fast";
  m.def("build_info", &build_info, "Compiler, torch, instruction sets and CUDA that the kernels were built with.");
  m.def("usable_isas", &usable_isas, "Instruction sets of the CPU kernels that this processor runs, narrowest first.");
  m.def("isa_code", [](const std::string& name) {
    for (int64_t isa = 0; isa < cpu::kIsaCount; ++isa) {
      if (name == cpu::kIsaNames[isa]) return isa;
    }
    throw pybind11::value_error("no instruction set is called " + name);
  });
}
