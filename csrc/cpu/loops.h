// The loops of kernels with one coefficient a channel: over units, rows and vectors.
#pragma once

#include "cpu/rows.h"
#include "cpu/vec.h"

namespace mnp_fast::cpu {
namespace {

// All lanes of a vector, or the first n: the others count as zero and are not stored. Results are stored, sums kept.
// What is taken is loaded, and what follows it asked for ahead: backwards, whose x was written long ago, gain 9 to 60
// %. So is what stores come to: with sums of every channel between them, backwards are 1.2 to 1.7 times as fast.
template <class V>
struct AllLanesOf {
  template <class T>
  V load(const T* p) const {
    return V::load(p);
  }
  template <class T>
  V take(const T* p) const {
    ask_ahead<kNear, V::kWidth>(p);
    return V::load(p);
  }
  template <class T>
  void store(V v, T* p) const {
    ask_ahead<kNear, V::kWidth>(p);
    v.store(p);
  }
  void keep(V v, float* p) const { v.store(p); }
};
using AllLanes = AllLanesOf<Vec>;

// All lanes of a vector that lies at a multiple of its size in the results, which are written past the cache.
template <class V>
struct StreamedLanesOf : AllLanesOf<V> {
  template <class T>
  V take(const T* p) const {
    ask_ahead<kFar, V::kWidth>(p);
    return V::load(p);
  }
  template <class T>
  void store(V v, T* p) const {
    v.stream(p);
  }
};

struct FirstLanes {
  int64_t n;
  template <class T>
  Vec load(const T* p) const {
    return Vec::load(p, n);
  }
  template <class T>
  Vec take(const T* p) const {
    return Vec::load(p, n);
  }
  template <class T>
  void store(Vec v, T* p) const {
    v.store(p, n);
  }
  void keep(Vec v, float* p) const { v.store(p, n); }
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
  auto load(int64_t i, Lanes lanes) const {
    return lanes.load(p + i);
  }
};

// body(i, lanes) for the vector at every i of a run of n numbers, from i = `begin` on. By reference: copies of what
// body holds went through memory at every run, and planes of 7x7 took 1.5 ms in place of .75.
template <class V = Vec, template <class> class Lanes = AllLanesOf, class Body>
MNP_ALWAYS_INLINE void for_vectors(int64_t n, const Body& body, int64_t begin = 0) {
  int64_t i = begin;
  for (; i + V::kWidth <= n; i += V::kWidth) body(i, Lanes<V>{});
  if constexpr (V::kWidth > Vec::kWidth) {
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) body(i, Lanes<Vec>{});
  }
  if (i < n) body(i, FirstLanes{n - i});
}

// The same for the numbers from `start` on, whose results may go past the cache.
template <class V = Vec, class Body>
MNP_ALWAYS_INLINE void for_vectors(const Rows& rows, int64_t start, int64_t n, const Body& body) {
  if (!rows.streamed) return for_vectors<V>(n, body);
  // Results begin at multiples of 64 bytes, which is a vector or several.
  int64_t i = -start & (V::kWidth - 1);
  if (i > n) i = n;
  for_vectors(i, body);
  for_vectors<V, StreamedLanesOf>(n, body, i);
}

// outside(start, channel) or inside(start, n) for every row of a range of units.
template <class Outside, class Inside>
MNP_ALWAYS_INLINE void for_rows(const Rows& rows, int64_t begin, int64_t end, Outside outside, Inside inside) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t start = unit * rows.row;
    if (rows.channels_last) {
      inside(start, rows.total - start < rows.row ? rows.total - start : rows.row);
    } else {
      outside(start, unit % rows.channels);
    }
  }
}

// row(start, n) for every row of a unit with the channels inside.
template <class Row>
MNP_ALWAYS_INLINE void for_rows_of_block(const Blocks& p, int64_t unit, Row row) {
  const int64_t length = p.rows.row, first = unit / p.blocks * p.sample;
  int64_t start = unit % p.blocks * p.block_rows * length;
  int64_t end = start + p.block_rows * length;
  if (end > p.sample) end = p.sample;
  // One row after the other: several at once keep the sums in registers, but were seen to halve the speed from memory.
  for (; start < end; start += length) row(first + start, end - start < length ? end - start : length);
}

}  // namespace
}  // namespace mnp_fast::cpu
