// Bytes moved: every number is read once, and 12 bytes a row are written. Bound by memory: on a device with bandwidth B
// n numbers of e bytes take n*e / B at least.
//
// One launch for all tensors, told of them by a table among its own parameters: no copy, no memory on the device, and
// nothing that a captured graph could outlive. A row is read by a warp or, where it is long, by a block, in accesses of
// 16 bytes from the first address that allows them. Sums are added in an order that depends on sizes and alignment
// alone.
#include "cuda/channel_magnitude.h"
#include "cuda/common.cuh"

namespace mnp_fast::cuda {
namespace {

constexpr int kThreads = 256;
// Rows no longer than this are read by a warp each, longer ones by a block each.
constexpr int64_t kWarpRow = 1024;
// Tensors of a launch. Its parameters may have 4 KB, and 32,764 bytes since CUDA 12.1; the small table is faster to
// send.
constexpr int kSmallTable = 128;
constexpr int kLargeTable = CUDART_VERSION >= 12010 ? 1024 : kSmallTable;

template <int kTensors>
struct Table {
  float* out;
  int64_t total;
  const void* data[kTensors];
  int64_t length[kTensors];
  int64_t first_row[kTensors + 1];
  // Ascending; a tensor without rows has no block. Entry `count` is the number of all blocks.
  uint32_t first_block[kTensors + 1];
  int32_t count;
};
static_assert(sizeof(Table<kSmallTable>) <= 4096 && sizeof(Table<kLargeTable>) <= 32764);

int64_t rows_per_block(int64_t length) { return length <= kWarpRow ? kThreads / kWarp : 1; }

struct Magnitude {
  float l1 = 0.0f, l2 = 0.0f, largest = 0.0f;  // l2: squared

  __device__ __forceinline__ void take(float x) {
    const float size = fabsf(x);
    l1 += size;
    l2 = fmaf(x, x, l2);
    largest = fmaxf(largest, size);
  }
  __device__ __forceinline__ void add(const Magnitude& other) {
    l1 += other.l1;
    l2 += other.l2;
    largest = fmaxf(largest, other.largest);
  }
};

__device__ __forceinline__ Magnitude warp_total(Magnitude value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Magnitude other;
    other.l1 = __shfl_down_sync(0xffffffffu, value.l1, offset);
    other.l2 = __shfl_down_sync(0xffffffffu, value.l2, offset);
    other.largest = __shfl_down_sync(0xffffffffu, value.largest, offset);
    value.add(other);
  }
  return value;
}

// One row, read by the kGroup threads of a warp or of the block; all of them must be here.
template <class T, int kGroup>
__device__ __forceinline__ void one_row(const T* x, int64_t length, float* out, int64_t total) {
  constexpr int kV = kPerAccess<T>;
  const int lane = threadIdx.x % kGroup;
  // Numbers before the first address that is a multiple of 16.
  int64_t head = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
  if (head > length) head = length;
  const int64_t packs = (length - head) / kV;
  Magnitude found;
  for (int64_t i = lane; i < head; i += kGroup) found.take(widen(x[i]));
#pragma unroll 4
  for (int64_t i = lane; i < packs; i += kGroup) {
    const Pack<T, kV> pack = load<T, kV>(x + head + i * kV);
#pragma unroll
    for (int k = 0; k < kV; ++k) found.take(widen(pack.v[k]));
  }
  for (int64_t i = head + packs * kV + lane; i < length; i += kGroup) found.take(widen(x[i]));
  found = warp_total(found);
  if constexpr (kGroup > kWarp) {
    __shared__ float parts[3][kGroup / kWarp];
    if (lane % kWarp == 0) {
      parts[0][lane / kWarp] = found.l1;
      parts[1][lane / kWarp] = found.l2;
      parts[2][lane / kWarp] = found.largest;
    }
    __syncthreads();
    if (lane == 0) {
      for (int w = 1; w < kGroup / kWarp; ++w) found.add({parts[0][w], parts[1][w], parts[2][w]});
    }
  }
  if (lane == 0) {
    out[0] = found.l1;
    out[total] = sqrtf(found.l2);
    // The L1 norm is NaN just where a number is; a largest number does not remember it.
    out[2 * total] = isnan(found.l1) ? found.l1 : found.largest;
  }
}

template <class T, int kTensors>
__global__ void __launch_bounds__(kThreads) magnitude(const __grid_constant__ Table<kTensors> table) {
  // The last tensor whose first block is not behind this one; the same for all threads.
  int tensor = 0, behind = table.count;
  while (behind - tensor > 1) {
    const int middle = (tensor + behind) / 2;
    if (table.first_block[middle] <= blockIdx.x) {
      tensor = middle;
    } else {
      behind = middle;
    }
  }
  const T* data = static_cast<const T*>(table.data[tensor]);
  const int64_t length = table.length[tensor], first = table.first_row[tensor];
  const int64_t rows = table.first_row[tensor + 1] - first;
  const int64_t block = blockIdx.x - table.first_block[tensor];
  if (length <= kWarpRow) {
    const int64_t row = block * (kThreads / kWarp) + threadIdx.x / kWarp;
    // A warp leaves as a whole.
    if (row < rows) one_row<T, kWarp>(data + row * length, length, table.out + first + row, table.total);
  } else {
    one_row<T, kThreads>(data + block * length, length, table.out + first + block, table.total);
  }
}

template <class T, int kTensors>
int launch(const MnpChannelMagnitude& p) {
  int64_t row = 0;
  for (int64_t begin = 0; begin < p.count; begin += kTensors) {
    Table<kTensors> table{};
    table.out = p.out;
    table.total = p.total;
    table.count = static_cast<int32_t>(p.count - begin < kTensors ? p.count - begin : kTensors);
    uint32_t blocks = 0;
    for (int32_t i = 0; i < table.count; ++i) {
      const MnpMagnitudeRows& tensor = p.tensors[begin + i];
      table.data[i] = tensor.data;
      table.length[i] = tensor.length;
      table.first_row[i] = row;
      table.first_block[i] = blocks;
      row += tensor.rows;
      blocks += static_cast<uint32_t>(ceil_div(tensor.rows, rows_per_block(tensor.length)));
    }
    table.first_row[table.count] = row;
    table.first_block[table.count] = blocks;
    if (blocks == 0) continue;
    magnitude<T, kTensors><<<blocks, kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(table);
    if (const int code = cudaGetLastError(); code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace mnp_fast::cuda

extern "C" int mnp_channel_magnitude(const MnpChannelMagnitude* p) {
  using namespace mnp_fast::cuda;
  return typed(*p, [&](auto number) {
    using T = decltype(number);
    return p->count <= kSmallTable ? launch<T, kSmallTable>(*p) : launch<T, kLargeTable>(*p);
  });
}
