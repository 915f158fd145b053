// From tensors to what the CUDA launchers take. Any strides of a matrix will do; scales and zero
// points are contiguous.
#pragma once

#include <optional>
#include <vector>

#include "cuda/common/types.h"
#include "ops/check.h"
#include "ops/cuda_device.h"

namespace qk::cuda {

using Shape = std::vector<int64_t>;

inline void check_extent(const char* op, const char* name, int64_t rows, int64_t cols) {
  check(rows <= kMaxExtent && cols <= kMaxExtent, op, name, " has ", rows, " rows of ", cols,
        " values; the CUDA kernels take at most ", kMaxExtent, " of each");
}

inline Matrix matrix_of(const char* op, const char* name, const Tensor& tensor) {
  check(on_device(tensor), op, name, " must be on a CUDA device");
  check(tensor.dim() == 2, op, name, " must be 2-D [rows, cols], got ", tensor.dim(), "-D");
  check_extent(op, name, tensor.size(0), tensor.size(1));
  return {tensor.const_data_ptr(),
          dtype_of(op, tensor.scalar_type()),
          static_cast<int>(tensor.size(0)),
          static_cast<int>(tensor.size(1)),
          tensor.stride(0),
          tensor.stride(1)};
}

// x of an op that quantizes.
inline Matrix float_matrix(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  return matrix_of(op, "x", x);
}

// A grid for the kernels: block sizes cut to the matrix.
inline Blocks blocks_of(const char* op, const Tensor& x, const Grid& grid) {
  const auto cut = [](int64_t size, int64_t extent) {
    return static_cast<int>(size < extent ? size : extent > 1 ? extent : 1);
  };
  check(grid.rows * grid.cols <= kMaxExtent, op, "block makes a grid of ", grid.rows, " x ",
        grid.cols, "; the CUDA kernels take at most ", kMaxExtent, " blocks");
  return {cut(grid.block_rows, x.size(0)), cut(grid.block_cols, x.size(1)),
          static_cast<int>(grid.rows), static_cast<int>(grid.cols)};
}

inline Shape grid_shape(const Blocks& blocks) { return {blocks.grid_rows, blocks.grid_cols}; }

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

template <typename T>
const T* data_of(const char* op, const char* name, const Tensor& tensor) {
  check(on_device(tensor), op, name, " must be on a CUDA device");
  check(tensor.is_contiguous(), op, name, " must be contiguous, got strides ",
        text_of(tensor.strides()));
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline const float* scale_data(const Tensor& scale) {
  return static_cast<const float*>(scale.const_data_ptr());
}

inline const int8_t* zero_point_data(const OptionalTensor& zero_point) {
  return zero_point ? static_cast<const int8_t*>(zero_point->const_data_ptr()) : nullptr;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void check_launch(const char* op, cudaError_t status) {
  check(status == cudaSuccess, op, "kernel launch failed: ", cudaGetErrorString(status));
}

}  // namespace qk::cuda
