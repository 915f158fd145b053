// What the attention ops on CUDA check alike; the words are those of ops/attention.py.
#pragma once

#include <cmath>

#include "cuda/common/attention.h"
#include "ops/cuda_tensor.h"

namespace qk::cuda {

constexpr double kLog2E = 1.4426950408889634;

inline HeadRows head_rows(const char* op, const char* name, const Tensor& x) {
  check(on_device(x), op, name, " must be on a CUDA device");
  check(x.dim() == 4, op, name, " must be 4-D [batch, heads, tokens, head size], got ", x.dim(),
        "-D");
  qk::check_rows(op, name, x);
  return {
      x.const_data_ptr(), dtype_of(op, x.scalar_type()), {x.stride(0), x.stride(1), x.stride(2)}};
}

inline const int64_t* bound_data(const char* op, const char* name, const OptionalTensor& x,
                                 int64_t batch) {
  if (!x) return nullptr;
  check(x->scalar_type() == ScalarType::Long && x->dim() == 1 && x->size(0) == batch, op, name,
        " must be torch.int64 [", batch, "], a number per batch row, got ",
        name_of(x->scalar_type()), " ", text_of(x->sizes()));
  return data_of<int64_t>(op, name, *x);
}

inline void check_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                        const char* k_name, const char* v_name) {
  const int64_t batch = q.size(0), heads = q.size(1), size = q.size(3);
  check(k.size(0) == batch && k.size(3) == size && k.size(1) > 0 && heads % k.size(1) == 0, op,
        k_name, " must be [", batch, ", heads that divide ", heads, ", tokens, ", size, "], got ",
        text_of(k.sizes()));
  check(shape_of(v) == shape_of(k), op, v_name, " must have the shape of ", k_name, " ",
        text_of(k.sizes()), ", got ", text_of(v.sizes()));
  check(size % 16 == 0 && 0 < size && size <= kMaxHeadSize, op,
        "the head size must be a multiple of 16, at most ", kMaxHeadSize, ", got ", size);
}

inline void check_softmax(const char* op, double scale, int64_t window) {
  check(std::isfinite(scale) && scale > 0, op, "scale must be positive and finite, got ", scale);
  check(window >= 0, op, "window must not be negative, got ", window);
}

}  // namespace qk::cuda
