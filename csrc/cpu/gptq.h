// The GPTQ sweep: rows are lanes, columns go one after the other, and every block of columns takes
// the errors of all columns before it in one matrix product (left-looking).
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

// Columns [first, first + width) of the sweep, the same for all rows.
struct GptqStripe {
  int64_t first, width;
  // Whether columns become pairs once they are rounded: bf16 numbers of an even and an odd column
  // in the place of one number. `far` of them are, from the first one on.
  bool pairs;
  int64_t far;
  // Rows [0, first + width) of the factor in these columns, over its diagonal, in tiles of
  // panel_cols columns. A word of two rows, in pairs, before `far`; of one row from there on:
  // [block of `depth` words][tile][word][panel_cols], then the stripe's own rows:
  // [tile][own][panel_cols], of which those beyond `width` are the same rows in pairs.
  const float* factor;
  int64_t own;
  const float* diagonal;  // the factor's, for each of these columns
  const int32_t* group;   // the group of each of these columns
  // Whether the stripe is a group that gets its scale here, from its weights as updated so far.
  bool fit, symmetric;
  bool signs;  // whether each scale is also tried negated, after all others
  // What a range is shrunk by to find the scale with the least error: the first is 1.
  const float* shrink;
  int shrinks;
  float divisor;
  DType scale_dtype;
  int q_min, q_max;
  // 0: integer codes. 8, 4: values of e4m3 and e2m1, both as e4m3 codes; scales are given then.
  int float_bits;

  int64_t before() const { return first - far / 2; }  // words
};

// `panel_rows` rows side by side; those beyond `rows` are zero.
struct GptqPanel {
  float* values;  // [column][panel_rows]: the weight, then, once it is rounded, by how much it fell
  float* scale;   // [group][panel_rows]
  float* zero;    // the zero points likewise
  float* loss;    // [panel_rows]
  int8_t* codes;  // of the first row and column
  int64_t code_stride;
  int64_t rows;
};

struct GptqKernels {
  int panel_rows, panel_cols, depth;
  bool pairs;  // whether there are units for products of pairs: twice as fast
  // w's rows as a panel's values, zeros in lanes beyond them; whether they are all finite.
  bool (*load)(const float* w, int64_t stride, int64_t cols, int64_t rows, float* values);
  // Rows [begin, end) of a factor as GptqStripe::factor. `begin` is even; the stripe's own pairs
  // come with its last row.
  void (*pack)(const GptqStripe& stripe, const float* factor, int64_t stride, int64_t begin,
               int64_t end, float* packed);
  // The scale of the stripe, which is a group, or the rows, from its weights as they are now.
  void (*fit)(const GptqStripe& stripe, const GptqPanel& panel);
  // The stripe's columns make up for words [begin, end), a block of those before it.
  void (*make_up)(const GptqStripe& stripe, const GptqPanel& panel, int64_t begin, int64_t end);
  // Rounds the stripe's columns, which have made up for all before it. `weights`
  // [width][panel_rows] are theirs at the beginning. For what happens inside, `codes` has
  // panel_rows * width elements, `scratch` panel_rows * (2 * width + 2 * panel_cols), best at a
  // multiple of 64.
  void (*sweep)(const GptqStripe& stripe, const GptqPanel& panel, const float* weights,
                int8_t* codes, float* scratch);
};

// Those of the instruction set that dispatch.h chose.
const GptqKernels& gptq_kernels();

}  // namespace qk
