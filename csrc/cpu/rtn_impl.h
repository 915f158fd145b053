// See rtn.h.
#pragma once

#include "cpu/pack_impl.h"
#include "cpu/quantize_impl.h"
#include "cpu/reduce_impl.h"
#include "cpu/rtn.h"
#include "cpu/scale_impl.h"

namespace qk::QK_ISA {
namespace {

template <class T>
void block_row_rtn_int(const RtnInt& how, const BlockRow& block, void* scratch) {
  const T *x = static_cast<const T*>(block.x), *next = static_cast<const T*>(block.next);
  const int64_t cols = block.cols, blocks = (cols + block.block_cols - 1) / block.block_cols;
  float* low = reinterpret_cast<float*>(static_cast<char*>(scratch) + reduce_scratch_bytes(cols));
  float* high = low + cols;
  int8_t* codes = reinterpret_cast<int8_t*>(high + cols);
  const int8_t* zero_point = how.symmetric ? nullptr : block.zero_point;
  if (how.symmetric) {
    block_row_absmax(x, block.stride, block.rows, cols, block.block_cols, scratch, high);
    symmetric_scales(high, blocks, how.divisor, how.scale_dtype, block.scale);
  } else {
    block_row_minmax(x, block.stride, block.rows, cols, block.block_cols, scratch, low, high);
    asymmetric_scales(low, high, blocks, how.q_min, how.q_max, how.scale_dtype, block.scale,
                      block.zero_point);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    char* out = static_cast<char*>(block.q) + r * block.q_stride;
    int8_t* row_codes = how.pack_bits ? codes : reinterpret_cast<int8_t*>(out);
    row_quantize_int(x + r * block.stride, next ? next + r * block.stride : nullptr, cols,
                     block.block_cols, block.scale, zero_point, how.q_min, how.q_max, row_codes);
    if (how.pack_bits) row_pack(codes, cols, how.pack_bits, reinterpret_cast<int32_t*>(out));
  }
}

template <class T, class Format>
void block_row_rtn_fp8(Format format, const BlockRow& block, void* scratch) {
  const T *x = static_cast<const T*>(block.x), *next = static_cast<const T*>(block.next);
  const int64_t cols = block.cols, blocks = (cols + block.block_cols - 1) / block.block_cols;
  float* amax = reinterpret_cast<float*>(static_cast<char*>(scratch) + reduce_scratch_bytes(cols));
  block_row_absmax(x, block.stride, block.rows, cols, block.block_cols, scratch, amax);
  symmetric_scales(amax, blocks, Format::kMax, DType::kFloat32, block.scale);
  for (int64_t r = 0; r < block.rows; ++r) {
    uint8_t* out = static_cast<uint8_t*>(block.q) + r * block.q_stride;
    row_quantize_fp8<true>(x + r * block.stride, next ? next + r * block.stride : nullptr, cols,
                           block.block_cols, block.scale, format, out);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
