// The torch boundary shared by csrc/ops/*_cpu.cpp and *_cuda.cpp: what an op checks before a kernel
// sees a pointer. The words are those of the reference (python/quantkit/ops), so that a mistake
// reads the same whichever kernel serves the call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/types.h"

namespace qk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using IntList = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

// Throws std::runtime_error "quantkit::<op>: <parts>", a RuntimeError in Python, unless `ok`. Not
// STD_TORCH_CHECK, which puts a C++ function and line in front of the message.
template <typename... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream message;
  message << "quantkit::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The dtype as Python writes it.
inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    default:
      return "a dtype that no quantkit op takes";
  }
}

// [2, 3], as Python writes a list.
inline std::string text_of(IntList values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline bool is_fp8(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2;
}

// What the kernels call this dtype. Ask only after the check that says which ones the op takes.
inline DType dtype_of(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    case ScalarType::Float8_e5m2:
      return DType::kFloat8E5M2;
    default:
      break;
  }
  check(false, op, "no kernel for ", name_of(dtype));
  return DType::kFloat32;
}

inline void check_float(const char* op, const char* name, const Tensor& x) {
  check(is_float(x.scalar_type()), op, name, " must be float32, float16 or bfloat16, got ",
        name_of(x.scalar_type()));
}

// Quantized values: int8 or FP8.
inline void check_quantized(const char* op, const char* name, const Tensor& q) {
  check(q.scalar_type() == ScalarType::Char || is_fp8(q.scalar_type()), op, name,
        " must be int8, float8_e4m3fn or float8_e5m2, got ", name_of(q.scalar_type()));
}

inline void check_fp8_dtype(const char* op, ScalarType dtype) {
  check(is_fp8(dtype), op, "dtype must be float8_e4m3fn or float8_e5m2, got ", name_of(dtype));
}

inline void check_scale_dtype(const char* op, ScalarType dtype) {
  check(is_float(dtype), op, "scale_dtype must be float32, bfloat16 or float16, got ",
        name_of(dtype));
}

inline void check_code_range(const char* op, int64_t q_min, int64_t q_max) {
  check(-128 <= q_min && q_min < q_max && q_max <= 127, op, "[q_min, q_max] must fit int8, got [",
        q_min, ", ", q_max, "]");
}

// Kernels that walk along a row need its elements side by side; the row stride is free.
inline void check_rows(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 0 || x.size(-1) <= 1 || x.numel() == 0 || x.stride(-1) == 1, op, name,
        " must have its last dimension contiguous, got strides ", text_of(x.strides()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& x, const char* x_name = "x") {
  check(tensor.is_cuda() == x.is_cuda() && tensor.get_device_index() == x.get_device_index(), op,
        name, " must be on ", x_name, "'s device");
}

// A block as given, its -1 replaced by the extent, and the grid of such blocks that covers the
// matrix.
struct Grid {
  int64_t block_rows, block_cols;
  int64_t rows, cols;
};

inline Grid check_matrix(const char* op, const Tensor& x, IntList block) {
  check(x.dim() == 2, op, "x must be 2-D [rows, cols], got ", x.dim(), "-D");
  check(block.size() == 2, op, "block must be [rows, cols], got ", text_of(block));
  for (int64_t size : block) {
    check(size == -1 || size > 0, op,
          "block sizes must be positive, or -1 for the whole extent, got ", text_of(block));
  }
  Grid grid;
  grid.block_rows = block[0] == -1 ? x.size(0) : block[0];
  grid.block_cols = block[1] == -1 ? x.size(1) : block[1];
  grid.rows = x.size(0) == 0 ? 0 : (x.size(0) - 1) / grid.block_rows + 1;
  grid.cols = x.size(1) == 0 ? 0 : (x.size(1) - 1) / grid.block_cols + 1;
  return grid;
}

// Scale and zero point of an op that takes them: fp32 and int8, contiguous, of the grid that
// `block` makes of x.
inline Grid check_scale(const char* op, const Tensor& x, const Tensor& scale,
                        const std::optional<Tensor>& zero_point, IntList block) {
  const Grid grid = check_matrix(op, x, block);
  const int64_t shape[] = {grid.rows, grid.cols};
  check(scale.dim() == 2 && scale.size(0) == grid.rows && scale.size(1) == grid.cols &&
            scale.scalar_type() == ScalarType::Float,
        op, "scale must be float32 ", text_of({shape, 2}), " for x ", text_of(x.sizes()),
        " and block ", text_of(block), ", got ", name_of(scale.scalar_type()), " ",
        text_of(scale.sizes()));
  check(scale.is_contiguous(), op, "scale must be contiguous, got strides ",
        text_of(scale.strides()));
  check_same_device(op, "scale", scale, x);
  if (zero_point) {
    check(zero_point->dim() == 2 && zero_point->size(0) == grid.rows &&
              zero_point->size(1) == grid.cols && zero_point->scalar_type() == ScalarType::Char,
          op, "zero_point must be int8 with scale's shape ", text_of({shape, 2}));
    check(zero_point->is_contiguous(), op, "zero_point must be contiguous, got strides ",
          text_of(zero_point->strides()));
    check_same_device(op, "zero_point", *zero_point, x);
  }
  return grid;
}

// What both directions of int32 packing ask for.
inline void check_packing(const char* op, const Tensor& x, ScalarType dtype, int64_t num_bits) {
  check(num_bits == 4 || num_bits == 8, op, "num_bits must be 4 or 8, got ", num_bits);
  check(x.dim() == 2 && x.scalar_type() == dtype, op, "expected a 2-D ", name_of(dtype),
        " tensor, got ", x.dim(), "-D ", name_of(x.scalar_type()));
}

// An uninitialised tensor on x's device.
inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(x, IntList(shape.begin(), shape.size()), dtype);
}

}  // namespace qk
