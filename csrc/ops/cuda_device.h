// The few things that tie the torch boundary to a real device; the host emulation
// (tests/cuda_emulation) has its own version of this file.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "ops/check.h"

#define QUANTKIT_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(quantkit, CUDA, m)

namespace qk::cuda {

using torch::stable::accelerator::DeviceGuard;

inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

inline DeviceGuard use_device_of(const Tensor& tensor) {
  if (!tensor.is_cuda())
    throw std::runtime_error("quantkit: an op's first tensor is on the CPU, another on a device");
  return DeviceGuard(tensor.get_device_index());
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// 80, 89, 90 and the like.
inline int compute_capability(const Tensor& tensor) {
  int major = 0, minor = 0;
  const int device = tensor.get_device_index();
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return major * 10 + minor;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// What the kernels left in a device word, once all that was launched before is done.
inline int fetch(const Tensor& word) {
  const cudaStream_t stream = current_stream(word);
  int value = 0;
  cudaError_t status =
      cudaMemcpyAsync(&value, word.const_data_ptr(), sizeof(value), cudaMemcpyDeviceToHost, stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return value;
}

}  // namespace qk::cuda
