// What the attention ops on CUDA do alike.
#pragma once

#include "cuda/common/attention.h"
#include "ops/attention_check.h"
#include "ops/cuda_tensor.h"

namespace qk::cuda {

constexpr double kLog2E = 1.4426950408889634;

// Of a tensor whose dimensions have been checked.
inline HeadRows head_rows(const char* op, const char* name, const Tensor& x) {
  check(on_device(x), op, name, " must be on a CUDA device");
  return {
      x.const_data_ptr(), dtype_of(op, x.scalar_type()), {x.stride(0), x.stride(1), x.stride(2)}};
}

// What a query sees, once it has been checked.
inline void set_bounds(const char* op, AttentionHow& how, double scale,
                       const OptionalTensor& starts, const OptionalTensor& lengths) {
  how.starts = starts ? data_of<int64_t>(op, "starts", *starts) : nullptr;
  how.lengths = lengths ? data_of<int64_t>(op, "lengths", *lengths) : nullptr;
  how.scale = static_cast<float>(scale * kLog2E);
}

}  // namespace qk::cuda
