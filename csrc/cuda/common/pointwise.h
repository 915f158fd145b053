// What stands between the products of a layer: RMS norm and SiLU times up, either with the codes of
// each token behind it, and rotary embedding. Each computes in fp32 and rounds once.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

// Where rows go: numbers of x's dtype to `values`, or codes and a scale for each row.
struct RowOutput {
  void* values;
  DType code;  // kInt8 or an FP8, if values is null
  uint8_t* codes;
  float* scale;
};

// x and residual (whose data may be null) are of one dtype and size, `weight` [cols] too; the sum
// of both, if there are two, goes to `sum`.
cudaError_t rms_norm(const Matrix& x, const Matrix& residual, const void* weight, float epsilon,
                     void* sum, const RowOutput& out, cudaStream_t stream);

cudaError_t silu_mul(const Matrix& gate, const Matrix& up, const RowOutput& out,
                     cudaStream_t stream);

// Heads of a batch of tokens: element (b, h, t, i) lies at b * strides[0] + h * strides[1] + t *
// strides[2] + i of `data`.
struct Heads {
  const void* data;
  DType dtype;
  int batch, heads, tokens, size;
  int64_t strides[3];
};

// The first 2 * half elements of every head are turned by the angles of its token: cosine and sine
// [batch or 1, tokens, 2 * half], with the strides of their first two dimensions (0 for one row of
// all). out [batch, tokens, heads, size].
struct Angles {
  const void *cosine, *sine;
  int half;
  int64_t cosine_strides[2], sine_strides[2];
};
cudaError_t rotary_embedding(const Heads& x, const Angles& angles, void* out, cudaStream_t stream);

}  // namespace qk::cuda
