// Activations as the products take them: rows 16 bytes aligned, quantized, in the order of columns
// that the weight wants.
#pragma once

#include "cuda/common/gemm.h"

namespace qk::cuda {

// int8 codes of rows and what belongs to them. Scales: found per row, or given as one number (and
// zero point), or one of each expert.
struct Int8Rows {
  Matrix x;
  Experts experts;
  bool symmetric;
  const float* scale;        // given, or null
  const int8_t* zero_point;  // given, or null
  const bool* left_out;      // columns whose values count as zero, or null
  int8_t* codes;
  int64_t row_bytes;
  float* row_scale;   // NaN where a row has one
  int32_t* row_zero;  // or null: not wanted
  int32_t* sums;      // of codes [rows][groups] for groups of `group` columns, or null
  int groups, group;
};
cudaError_t int8_rows(const Int8Rows& rows, cudaStream_t stream);

// FP8 codes (e4m3fn) of rows, or their values in fp16, without their scales. A scale for each
// `group` columns of a row, found or given as above.
struct Float8Rows {
  Matrix x;
  Experts experts;
  const float* scale;
  int group, groups;
  void* data;
  bool codes;
  int64_t row_bytes;
  float* scales;  // of each row and group, so far apart
  int64_t scale_row_step, scale_group_step;
};
cudaError_t float8_rows(const Float8Rows& rows, cudaStream_t stream);

// Rows copied so that they are aligned, columns in the order `perm` (of each expert) or as they
// are; fp32 as three planes of bf16, fp16 as two if `planes` says so. Bytes: x is int8.
struct StagedRows {
  Matrix x;
  Experts experts;
  const int32_t* perm;
  void* data;
  int64_t row_bytes, plane_bytes;
  int planes;  // 1: as it is
};
cudaError_t stage_rows(const StagedRows& rows, cudaStream_t stream);

// Columns of x with a magnitude of `threshold` or more: `left_out` [cols], and their numbers in
// rising order with their count.
cudaError_t find_wide_columns(const Matrix& x, float threshold, bool* left_out, int32_t* count,
                              int32_t* columns, cudaStream_t stream);

// Of each expert's rows, the largest of `of_rows` [rows], as the scale of symmetric codes with
// `divisor`.
cudaError_t scale_of_experts(const float* of_rows, int rows, const Experts& experts, float divisor,
                             float* scale, cudaStream_t stream);

}  // namespace qk::cuda
