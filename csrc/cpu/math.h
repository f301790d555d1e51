// Functions of a Vec to float32 accuracy. NaN gives anything.
#pragma once

#include "act.h"
#include "cpu/vec.h"

namespace mnp_fast::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;

template <int kCount>
MNP_ALWAYS_INLINE Vec polynomial(const float (&k)[kCount], Vec x) {
  Vec sum = Vec::fill(k[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) sum = fma(sum, x, Vec::fill(k[i]));
  return sum;
}

// 2^y for -125 <= y <= 125, relative error 2e-7: 2^round(y) goes into the exponent, the rest, at most a half, through a
// polynomial fitted for the largest relative error.
MNP_ALWAYS_INLINE Vec exp2(Vec y) {
  constexpr float k[] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647296f};
  // 1.5 * 2^23: beside it only whole numbers are left of y, in the low bits.
  const Vec shift = Vec::fill(12582912.0f);
  const Vec shifted = y + shift;
  return polynomial(k, y - (shifted - shift)).times_power(shifted);
}

// erfcx(a/sqrt(2))/2 for 0 <= a <= kGeluLimit.
MNP_ALWAYS_INLINE Vec normal_tail(Vec a) {
  constexpr float k[] = {MNP_NORMAL_TAIL};
  return polynomial(k, a);
}

}  // namespace
}  // namespace mnp_fast::cpu
