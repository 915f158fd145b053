// Products of activations with packed weights: what the torch boundary tells the launchers.
//
// Weights lie in panels of 64 output channels, each a matrix of words [word rows][64], as pack_*
// lays them out for every device; a word holds neighbouring k of one channel. Kinds of weight are
// those of gemm_weights.h.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

constexpr int kPanel = 64;

// Rows of activations sorted by expert: those of expert e are offsets[e] to offsets[e + 1]. Count
// 0: there is one weight for all rows.
struct Experts {
  const void* offsets;
  bool wide;  // int64, not int32
  int count;
};

// What is multiplied: rows of 16-bit numbers or of int8 codes, 16 bytes aligned. fp32 numbers are
// the sum of three bf16, fp16 ones of two where the weights are bf16: so many planes.
struct Activations {
  const void* data;
  int64_t row_bytes, plane_bytes;
  int planes, rows;
  int depth;  // columns
};

struct PackedWeight {
  const void* words;
  int word_rows;
  int64_t panel_words, expert_words;  // from one to the next
  int out_features;
};

// Scales of the weight, [out_features / rows][groups] of each expert, and of the activations, of
// each row and so many of its columns, or null. K is cut into segments within which neither
// changes; their product multiplies a segment's sum. Segments that are no whole units of the kernel
// (32 columns, 64 of FP8 codes) go to a slower one.
struct GroupScales {
  const void* data;  // null: ones
  DType dtype;
  const int8_t* zero_point;  // like the scales, or null
  int rows, columns;         // of the weight that share a scale
  int groups;                // along K
  int64_t expert_scales;     // from one expert to the next
  bool by_panels;            // scales lie as [panels][groups][64], for rows = 1
  const float* input;
  int input_columns;
  int64_t input_row_step, input_group_step;
  const int32_t* input_sums;  // of codes, [rows][groups]: for the zero points of W4A8
  int segment;                // columns; 0: all of K
};

// W8A8: y = sums * (input[m] * weight[n]). `zero` of the rows, or null.
struct RowScales {
  const float* input;
  const int32_t* zero;
  const float* weight;
  bool one_weight;
};

// Columns of x that the sums leave out, multiplied as they are (LLM.int8()): null, or how many and
// which they are, in device memory.
struct WideColumns {
  const int32_t* count;
  const int32_t* columns;
  Matrix x;
};

// y + bias, rounded; then rounded once more times row_scale. Contiguous.
struct GemmOutput {
  void* data;
  DType dtype;
  bool sums;  // int32 sums as they are
  const void* bias;
  DType bias_dtype;
  const float* row_scale;
};

struct GemmArgs {
  Activations a;
  PackedWeight weight;
  Experts experts;
  GroupScales groups;
  RowScales scales;
  WideColumns wide;
  GemmOutput out;
};

// How a product is spread over blocks of threads. Decided by the shapes alone, so that sums are
// taken in the same order on every device.
constexpr int kOddGroups = -1;
struct GemmPlan {
  int shape;   // of the kernel's tiles; kOddGroups: those of gemm_odd.cu
  int splits;  // of K; more than one leaves sums in the workspace for a second kernel to join
  int split_units;
  int row_tiles, panel_tiles;
  int64_t workspace;  // words
};

// FP8 codes by FP8 codes: sums are added to others after so many columns, for tensor cores may keep
// no more than 14 bits; segments are multiples of half of that.
constexpr int kFloat8Columns = 128, kFloat8Segment = 64;

enum class WeightKind { kInt8, kInt4ByInt8, kInt4, kByte, kFloat8, kBFloat16 };

// A kernel's tiles: results, columns of K in a unit, units of a stage; and how many tiles keep a
// large device busy.
struct TileExtent {
  int rows, cols;
  int unit, stage_units;
  int busy;
};
// `whole_segments`: a part of K is made of whole segments, each with its own sums in the workspace.
GemmPlan plan_tiles(const GemmArgs& args, int shape, const TileExtent& tile, bool whole_segments);

// What the kernels take, for a kind of weight and the activations' dtype, of 16 bits or that of
// codes: kInt8, kFloat8E4M3 (from sm_89 on).
GemmPlan plan_gemm(WeightKind kind, DType dtype, const GemmArgs& args);
cudaError_t gemm(WeightKind kind, DType dtype, const GemmArgs& args, const GemmPlan& plan,
                 void* workspace, cudaStream_t stream);

cudaError_t gemm_of_odd_groups(WeightKind kind, DType dtype, const GemmArgs& args,
                               cudaStream_t stream);

}  // namespace qk::cuda
