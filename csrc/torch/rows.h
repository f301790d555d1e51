// What the CPU glue of ops with one coefficient a channel needs: memory cut into units, units spread over threads, sums
// of each sample put together.
#pragma once

#include <numeric>
#include <vector>

#include "cpu/rows.h"
#include "torch/cpu.h"

namespace mnp_fast {

// Numbers in a unit of sums where channels are inside: fixed, so that sums do not depend on the threads.
inline constexpr int64_t kBlock = 65536;

// How often the channels are repeated in a row: enough for whole vectors where there are few channels, at most `most`.
inline int64_t repeats(int64_t channels, int64_t most) {
  constexpr int64_t kVector = 16;
  int64_t times = kVector / std::gcd(channels, kVector);
  if (channels * times > 4096) return 1;
  while (channels * times < 64) times *= 2;
  return times <= most ? times : 1;
}

// Rows of memory that is not empty, in which at most `most` positions may lie together.
inline cpu::Rows rows_of(cpu::DType dtype, const Layout& layout, int64_t most) {
  const int64_t row = layout.channels_last ? layout.c * repeats(layout.c, most) : layout.s;
  return {dtype, layout.channels_last, layout.c, row, layout.numel(), false};
}

inline cpu::Rows rows_of(cpu::DType dtype, const Layout& layout) { return rows_of(dtype, layout, layout.n * layout.s); }

// Whether results of this size go past the cache: they would not be there any more when they are read, and without
// their lines in the cache memory is not read before it is written (1.2 to 1.5 times as fast from memory).
inline bool streamed(const Tensor& result) {
  constexpr int64_t kBeyondCache = 16 << 20;
  const int64_t bytes = result.numel() * (result.scalar_type() == ScalarType::Float ? 4 : 2);
  return bytes >= kBeyondCache && reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 64 == 0;
}

// run(begin, end) for all rows, over the threads.
template <class Run>
void for_units(const cpu::Rows& rows, Run run) {
  torch::stable::parallel_for(0, (rows.total + rows.row - 1) / rows.row, kGrain / rows.row + 1, run);
}

// Sums over the positions of every sample and channel of memory that is not empty.
struct SampleSums {
  cpu::Blocks blocks;
  int64_t units;

  SampleSums(cpu::DType dtype, const Layout& layout) {
    const cpu::Rows rows = rows_of(dtype, layout, layout.s);
    const int64_t sample = layout.c * layout.s, block_rows = kBlock / rows.row + 1, block = block_rows * rows.row;
    blocks = {rows, sample, layout.channels_last ? (sample + block - 1) / block : 1, block_rows};
    units = layout.channels_last ? layout.n * blocks.blocks : layout.n * layout.c;
  }

  // A sample in several parts: each part has sums of its own, which add() puts together.
  bool in_parts() const {
    return blocks.rows.channels_last && (blocks.blocks > 1 || blocks.rows.row > blocks.rows.channels);
  }
  // Numbers that all parts leave for one sum.
  int64_t partial() const { return in_parts() ? units * blocks.rows.row : 0; }

  // run(begin, end) for all units, over the threads.
  template <class Run>
  void for_units(Run run) const {
    const int64_t block = blocks.blocks > 1 ? blocks.block_rows * blocks.rows.row : blocks.sample;
    const int64_t size = blocks.rows.channels_last ? block : blocks.rows.row;
    torch::stable::parallel_for(0, units, kGrain / size + 1, run);
  }

  // The parts of every sample and channel, added up in the order of memory.
  void add(const float* partial, float* out) const {
    const int64_t c = blocks.rows.channels, parts = blocks.blocks * blocks.rows.row;
    for (int64_t i = 0; i < units / blocks.blocks * c; ++i) {
      float total = 0.0f;
      for (int64_t k = i / c * parts + i % c; k < (i / c + 1) * parts; k += c) total += partial[k];
      out[i] = total;
    }
  }
};

// a, b and center, each repeated to `entries` numbers.
struct Coefficients {
  std::vector<float> values;
  int64_t row;

  Coefficients(const Tensor& x, const Tensor& mask, const Tensor& scale, const Tensor& center, const Tensor& shift,
               int64_t channels, int64_t entries)
      : values(3 * entries), row(entries) {
    const float* m = check_vector(mask, channels, x, "mask");
    const float* s = check_vector(scale, channels, x, "scale");
    const float* mean = check_vector(center, channels, x, "center");
    const float* t = check_vector(shift, channels, x, "shift");
    for (int64_t i = 0; i < row; ++i) {
      const int64_t c = i % channels;
      const float a = m[c] * s[c];
      values[i] = a;
      // Rounded once: where a*center is large, what is left of a*x + b is small.
      values[row + i] = static_cast<float>(t[c] - static_cast<double>(a) * mean[c]);
      values[2 * row + i] = mean[c];
    }
  }
  const float* a() const { return values.data(); }
  const float* b() const { return values.data() + row; }
  const float* center() const { return values.data() + 2 * row; }
};

}  // namespace mnp_fast
