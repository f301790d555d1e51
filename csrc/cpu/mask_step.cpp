// Bytes moved for each neuron: 24, four numbers read and two written. Bound by memory, or by the launch where masks are
// few. Every product and sum is rounded, so that all instruction sets give the same bits.
#include "cpu/mask_step.h"

#include "cpu/vec.h"

namespace mnp_fast::cpu {
namespace {

constexpr int64_t kWidth = Vec::kWidth;

// Momentum and mask of one vector of neurons, in place.
MNP_ALWAYS_INLINE void step_one(Vec rate, Vec decay, Vec penalty, Vec grad, Vec magnitude, Vec& momentum, Vec& mask) {
  momentum = decay * momentum + grad + penalty * magnitude;
  // In this order NaN stays NaN.
  mask = min(Vec::fill(1.0f), max(Vec::fill(0.0f), mask - rate * momentum));
}

void step(const MaskStep& p, int64_t begin, int64_t end) {
  const Vec rate = Vec::fill(p.rate), decay = Vec::fill(p.decay), penalty = Vec::fill(p.penalty);
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    Vec momentum = Vec::load(p.momentum + i), mask = Vec::load(p.mask + i);
    step_one(rate, decay, penalty, Vec::load(p.grad + i), Vec::load(p.magnitude + i), momentum, mask);
    momentum.store(p.momentum + i);
    mask.store(p.mask + i);
  }
  if (const int64_t rest = end - i; rest > 0) {
    Vec momentum = Vec::load(p.momentum + i, rest), mask = Vec::load(p.mask + i, rest);
    step_one(rate, decay, penalty, Vec::load(p.grad + i, rest), Vec::load(p.magnitude + i, rest), momentum, mask);
    momentum.store(p.momentum + i, rest);
    mask.store(p.mask + i, rest);
  }
}

}  // namespace

namespace MNP_ISA {
const MaskStepKernels mask_step = {step};
}

}  // namespace mnp_fast::cpu
