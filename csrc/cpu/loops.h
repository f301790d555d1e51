// The loops of kernels with one coefficient a channel.
#pragma once

#include "cpu/vec.h"

namespace mnp_fast::cpu {
namespace {

// All lanes of a vector, or the first n: the others count as zero and are not stored.
struct AllLanes {
  template <class T>
  Vec load(const T* p) const {
    return Vec::load(p);
  }
  template <class T>
  void store(Vec v, T* p) const {
    v.store(p);
  }
};

struct FirstLanes {
  int64_t n;
  template <class T>
  Vec load(const T* p) const {
    return Vec::load(p, n);
  }
  template <class T>
  void store(Vec v, T* p) const {
    v.store(p, n);
  }
};

// A coefficient along a run of numbers: of one channel for all, or of one channel each.
struct OneChannel {
  Vec v;
  template <class Lanes>
  Vec load(int64_t, Lanes) const {
    return v;
  }
};

struct EachChannel {
  const float* p;
  template <class Lanes>
  Vec load(int64_t i, Lanes lanes) const {
    return lanes.load(p + i);
  }
};

// body(i, lanes) for the vector at every i of a run of n numbers.
template <class Body>
MNP_ALWAYS_INLINE void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) body(i, AllLanes{});
  if (i < n) body(i, FirstLanes{n - i});
}

}  // namespace
}  // namespace mnp_fast::cpu
