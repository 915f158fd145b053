// Stands in for csrc/ops/cuda_device.h: "device" tensors are CPU tensors in guarded memory, there
// is one stream, and the ops are registered as torch.ops.quantkit_emulated.* (tests declare their
// schemas).
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "ops/check.h"

#define QUANTKIT_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(quantkit_emulated, CPU, m)

namespace qk::cuda {

struct NoGuard {
  ~NoGuard() {}
};

inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
inline NoGuard use_device_of(const Tensor&) { return {}; }
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);

inline int compute_capability(const Tensor&) { return 90; }

inline int fetch(const Tensor& word) { return *static_cast<const int*>(word.const_data_ptr()); }

}  // namespace qk::cuda
