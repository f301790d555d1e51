// Functions of a Vec, as exact as numbers of type T need: float32, or bfloat16 with its 8 bits. NaN gives anything.
#pragma once

#include "act.h"
#include "cpu/vec.h"

namespace mnp_fast::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;

// Powers of x, x^0 first.
template <int kCount, class V>
MNP_ALWAYS_INLINE V polynomial(const float (&k)[kCount], V x) {
  V sum = V::fill(k[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) sum = fma(sum, x, V::fill(k[i]));
  return sum;
}

// Fitted for the largest relative error of 2^f, |f| <= 1/2 (1e-7, 1e-4), and for the largest error of Q(a) and a*Q(a)
// of act.h with gelu (1.6e-7, 8e-6).
template <class T>
struct Fit;

template <>
struct Fit<float> {
  static constexpr float kExp2[] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647296f};
  static constexpr float kNormalTail[] = {MNP_NORMAL_TAIL};
};

template <>
struct Fit<BFloat16> {
  static constexpr float kExp2[] = {1.0f, 0.693282928f, 0.24221096f, 0.055008928f};
  static constexpr float kNormalTail[] = {0.5f,          -0.398701731f,  0.247549811f,   -0.124512367f,
                                          0.0482780398f, -0.0129401335f, 0.00204757729f, -0.000140462454f};
};

// 2^y for -125 <= y <= 125: 2^round(y) goes into the exponent, the rest, at most a half, through a polynomial.
template <class T, class V>
MNP_ALWAYS_INLINE V exp2(V y) {
  // 1.5 * 2^23: beside it only whole numbers are left of y, in the low bits.
  const V shift = V::fill(12582912.0f);
  const V shifted = y + shift;
  return polynomial(Fit<T>::kExp2, y - (shifted - shift)).times_power(shifted);
}

// erfcx(a/sqrt(2))/2 for 0 <= a <= kGeluLimit.
template <class T, class V>
MNP_ALWAYS_INLINE V normal_tail(V a) {
  return polynomial(Fit<T>::kNormalTail, a);
}

}  // namespace
}  // namespace mnp_fast::cpu
