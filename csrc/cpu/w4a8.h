// int4 weights with group scales times int8 activations: rows of x become codes, then tiles of
// (rows, 64 columns) are multiplied. Callers spread both steps over threads as they like; all is in
// raw pointers and ranges of rows, so that a caller with many weights, as of experts, may quantize
// all rows at once and multiply each range by its own weight.
//
// Codes of weights are unsigned, 0 to 15, and those of activations signed, as the units for dot
// products want them. What is off by a zero point is put right with the sums of the activations:
//
//   sum_k (code - 8 - zero) * a  =  sum_k code * a  -  (8 + zero) * sum_k a
//
// modulo 2^32, which is exact where the left side fits int32.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

// Weights are packed by panels of so many columns of the result, [K / 8][kW4Panel] words of eight
// codes along K: byte j of a word has code j in its low half and code 4 + j in its high half.
constexpr int64_t kW4Panel = 64;
constexpr int64_t w4a8_words(int64_t cols) { return (cols + 7) / 8; }
constexpr int64_t w4a8_panels(int64_t rows) { return (rows + kW4Panel - 1) / kW4Panel; }

// Longest group whose sums fit int32, whatever int8 the zero point is.
constexpr int64_t kW4MaxGroup = 0x7fffffff / ((7 + 128) * 127);

// Panel `panel` of words [rows, w4a8_words(cols)] whose half-byte i is code i, onto its place.
void w4a8_pack(const uint32_t* words, int64_t stride, int64_t rows, int64_t cols, int64_t panel,
               uint32_t* packed);
// Values [rows, groups] of `bytes` each (1, 2 or 4) as [groups][kW4Panel] of one panel.
void w4a8_pack_scales(const void* values, int64_t bytes, int64_t rows, int64_t groups,
                      int64_t panel, void* packed);

struct W4A8Weight {
  const uint32_t* words;  // the panels
  DType scale_dtype;
  const void* scale;         // [panels][groups][kW4Panel]
  const int8_t* zero_point;  // the same, or null: 0
  int64_t rows, cols;        // N, K
  int64_t group;             // divides cols; a multiple of 4 unless it is cols
  const void* bias;          // [rows], or null
  DType bias_dtype;

  int64_t groups() const { return cols ? cols / group : 0; }
};

// Quantized rows, w4a8_row_bytes apart, so that no two begin in the same set of a cache.
struct W4A8Tokens {
  int8_t* codes;
  int64_t stride;
  float* scale;
  int32_t* minus;  // [rows][groups]: minus the sum of the group's codes
};
constexpr int64_t w4a8_row_bytes(int64_t cols) { return (cols + 63) / 64 * 64 + 64; }

// Rows [begin, end) by one panel.
struct W4A8Task {
  W4A8Tokens tokens;
  int64_t begin, end;
  int64_t panel;
  int64_t next;  // the panel that follows, fetched meanwhile; -1 for none
  float* sums;   // scratch: kW4Panel for each of the rows
  DType dtype;   // of the result, whose row r begins at element r * stride
  void* out;
  int64_t stride;
};

struct W4A8Kernels {
  // Rows [begin, end) of x, stride in elements.
  void (*quantize)(DType dtype, const void* x, int64_t stride, int64_t cols, int64_t group,
                   int64_t begin, int64_t end, const W4A8Tokens& tokens);
  void (*multiply)(const W4A8Weight& weight, const W4A8Task& task);
  // Asks for what multiply reads first of a panel.
  void (*fetch)(const W4A8Weight& weight, int64_t panel);
};

// Those of the instruction set that dispatch.h chose.
const W4A8Kernels& w4a8_kernels();

}  // namespace qk
