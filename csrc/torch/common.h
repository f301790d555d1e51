// What the glue of every op needs: checks that keep a kernel inside its memory, for callers that skip the Python
// checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "act.h"

namespace mnp_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor as n samples of c channels and s positions, the channels inside where `channels_last`.
struct Layout {
  int64_t n, c, s;
  bool channels_last;
  int64_t numel() const { return n * c * s; }
};

// `tensor` holds exactly `numel` numbers that lie together without holes: its first number is the start of them all.
inline void check_dense(const Tensor& tensor, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " numbers instead of ", numel);
  if (numel == 0) return;
  int64_t span = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) span += (tensor.size(d) - 1) * tensor.stride(d);
  STD_TORCH_CHECK(span == numel, name, " is not dense in memory");
}

inline void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  check_dense(tensor, x.numel(), name);
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " has another dtype than x");
  STD_TORCH_CHECK(tensor.get_device_index() == x.get_device_index() && tensor.is_cuda() == x.is_cuda(), name,
                  " is on another device than x");
}

inline const float* check_vector(const Tensor& tensor, int64_t numel, const Tensor& x, const char* name) {
  check_dense(tensor, numel, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " is not float32");
  STD_TORCH_CHECK(tensor.get_device_index() == x.get_device_index() && tensor.is_cuda() == x.is_cuda(), name,
                  " is on another device than x");
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline Act check_act(int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act < kActCount, "there is no activation ", act);
  return static_cast<Act>(act);
}

// How many rows (dim 0) the tensors have together: dense, of one dtype and on one device.
inline int64_t check_rows(const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!weights.empty(), "there are no weights");
  int64_t rows = 0;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() > 0, "weights has a number without rows");
    check_dense(weight, weight.numel(), "weights");
    STD_TORCH_CHECK(weight.scalar_type() == weights[0].scalar_type(), "weights have several dtypes");
    STD_TORCH_CHECK(
        weight.get_device_index() == weights[0].get_device_index() && weight.is_cuda() == weights[0].is_cuda(),
        "weights are on several devices");
    rows += weight.size(0);
  }
  return rows;
}

inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace mnp_fast
