// Bytes moved: every number is read once, and 12 bytes a row are written. Bound by memory: the aim is 80 % of the
// bandwidth of reading as many bytes.
#include "cpu/channel_magnitude.h"

#include "cpu/vec.h"

namespace mnp_fast::cpu {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
// Numbers that are added up before they go into a total: sums of sums lose less.
constexpr int64_t kBlock = 4096;
// Vectors at a time, each with sums of its own: one sum would wait for the one before.
constexpr int64_t kAtOnce = 4;

struct Magnitude {
  Vec l1 = Vec::fill(0.0f), l2 = Vec::fill(0.0f), largest = Vec::fill(0.0f);  // l2: squared

  MNP_ALWAYS_INLINE void take(Vec x) {
    const Vec size = x.abs();
    l1 = l1 + size;
    l2 = fma(x, x, l2);
    largest = max(largest, size);
  }
  MNP_ALWAYS_INLINE void add(const Magnitude& other) {
    l1 = l1 + other.l1;
    l2 = l2 + other.l2;
    largest = max(largest, other.largest);
  }
};

template <class T>
MNP_ALWAYS_INLINE Magnitude magnitude(const T* x, int64_t n) {
  Magnitude total;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    Magnitude part[kAtOnce];
    int64_t i = start;
    for (; i + kAtOnce * kWidth <= end; i += kAtOnce * kWidth) {
      ask_ahead<kFar, kAtOnce * kWidth>(x + i);
      for (int64_t k = 0; k < kAtOnce; ++k) part[k].take(Vec::load(x + i + k * kWidth));
    }
    for (; i + kWidth <= end; i += kWidth) part[0].take(Vec::load(x + i));
    if (i < end) part[0].take(Vec::load(x + i, end - i));
    for (int64_t k = 1; k < kAtOnce; ++k) part[0].add(part[k]);
    total.add(part[0]);
  }
  return total;
}

float largest_lane(Vec v) {
  float lanes[kWidth];
  v.store(lanes);
  float found = 0.0f;
  for (int64_t i = 0; i < kWidth; ++i) found = lanes[i] > found ? lanes[i] : found;
  return found;
}

// The first row of a tensor whose cost begins at `position` or behind it.
int64_t row_at(const MagnitudeRows& t, int64_t position) {
  const int64_t cost = t.length + kRowCost;
  const int64_t row = position <= t.start ? 0 : (position - t.start + cost - 1) / cost;
  return row < t.rows ? row : t.rows;
}

template <class T>
void rows(const ChannelMagnitude& p, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < p.count; ++k) {
    const MagnitudeRows& t = p.tensors[k];
    const int64_t last = row_at(t, end);
    for (int64_t row = row_at(t, begin); row < last; ++row) {
      const Magnitude found = magnitude(static_cast<const T*>(t.data) + row * t.length, t.length);
      float* out = p.out + t.first + row;
      const float l1 = sum(found.l1);
      out[0] = l1;
      out[p.total] = __builtin_sqrtf(sum(found.l2));
      // The L1 norm is NaN just where a number is; a largest number does not remember it.
      out[2 * p.total] = l1 != l1 ? l1 : largest_lane(found.largest);
    }
  }
}

}  // namespace

namespace MNP_ISA {
const ChannelMagnitudeKernels channel_magnitude = {rows<float>, rows<BFloat16>};
}

}  // namespace mnp_fast::cpu
