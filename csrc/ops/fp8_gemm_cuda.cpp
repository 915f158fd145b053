// fp8_gemm and moe_fp8_gemm on CUDA: codes of x are multiplied as they are from sm_89 on, else as
// the fp16 numbers that they are.
#include <numeric>

#include "cuda/common/scale.h"
#include "ops/gemm_cuda.h"
#include "ops/reduce_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

using Block = std::vector<int64_t>;
using OptionalBlock = std::optional<Block>;
constexpr float kLargest = 448.0f;

// One scale for all of x, or for all rows of each expert.
Tensor tensor_scale(const char* op, const Tensor& x, const ExpertRows& rows) {
  const Matrix matrix = float_matrix(op, x);
  const int64_t count = rows ? matrix.rows : 1;
  const Blocks blocks{rows ? 1 : matrix.rows, matrix.cols, static_cast<int>(count), 1};
  const Tensor most = new_tensor(x, {count}, ScalarType::Float);
  reduce_blocks(op, matrix, blocks, {data<float>(most), nullptr, nullptr}, x);
  const Tensor scale = new_tensor(x, {rows ? rows.count() : 1}, ScalarType::Float);
  const cudaStream_t stream = current_stream(x);
  check_launch(op, rows ? scale_of_experts(data<float>(most), matrix.rows, rows.experts(), kLargest,
                                           data<float>(scale), stream)
                        : make_symmetric_scale(data<float>(most), 1, kLargest, DType::kFloat32,
                                               data<float>(scale), stream));
  return scale;
}

// Of x's codes as they are multiplied: as they are where the device and the segments allow it.
DType dtype_of_codes(const char* op, const GemmArgs& args, const Tensor& x) {
  const bool codes = takes_sm90(op, WeightKind::kFloat8, DType::kFloat8E4M3, args, x) ||
                     takes_float8_codes(op, args, x);
  return codes ? DType::kFloat8E4M3 : DType::kFloat16;
}

// All arguments are checked.
Tensor fp8_product(const char* op, const Tensor& x, const Tensor& packed,
                   const Tensor& weight_scale, const Fp8Grid& grid, int64_t out_features,
                   const OptionalTensor& input_scale, const OptionalBlock& input_block,
                   const OptionalTensor& bias, const ExpertRows& rows) {
  const Tensor out = new_tensor(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t cols = x.size(1);
  GemmArgs args = gemm_args(op, x, out, packed, (cols + 3) / 4, bias, rows);
  check_same_device(op, "weight_scale", weight_scale, x);
  if (input_scale) check_same_device(op, "input_scale", *input_scale, x);
  const auto extent = [](int64_t size) {
    return static_cast<int>(size < kMaxExtent ? size : kMaxExtent);
  };
  GroupScales& groups = args.groups;
  groups.data = weight_scale.const_data_ptr();
  groups.dtype = DType::kFloat32;
  groups.rows = extent(grid.rows);
  groups.columns = extent(grid.columns);
  groups.groups = static_cast<int>(grid.groups);
  groups.expert_scales = rows ? weight_scale.numel() / rows.count() : 0;

  const bool quantized = input_scale || input_block;
  int64_t group = cols;
  if (input_block && (*input_block)[1] > 0) group = std::min(cols, (*input_block)[1]);
  // Runs within which no scale changes, all of one length.
  const auto run = [&](int64_t length) { return length < cols ? length : 0; };
  groups.segment = static_cast<int>(std::gcd(run(grid.columns), run(group)));

  StagedInput staged{x, DType::kFloat16};
  Tensor scales = x;
  if (quantized) {
    staged.dtype = dtype_of_codes(op, args, x);
    const bool codes = staged.dtype == DType::kFloat8E4M3;
    const int64_t count = cols > 0 ? (cols + group - 1) / group : 0;
    const int64_t row_bytes = row_bytes_of(codes ? cols : cols * 2);
    staged.held = new_tensor(x, {x.size(0), row_bytes}, ScalarType::Char);
    scales = new_tensor(x, {x.size(0), count}, ScalarType::Float);
    // Tiles of many rows read the scales of one group after the other.
    const bool by_groups = codes && takes_sm90(op, WeightKind::kFloat8, staged.dtype, args, x);
    groups.input_row_step = by_groups ? 1 : count;
    groups.input_group_step = by_groups ? x.size(0) : 1;
    Tensor made = x;  // keeps the scale that is made here
    const float* given = pointer<float>(input_scale);
    if (!given && (*input_block)[0] == -1 && cols > 0) {
      made = tensor_scale(op, x, rows);
      given = data<float>(made);
    }
    if (cols > 0) {
      const Float8Rows how{float_matrix(op, x),
                           args.experts,
                           given,
                           static_cast<int>(group),
                           static_cast<int>(count),
                           data<void>(staged.held),
                           codes,
                           row_bytes,
                           data<float>(scales),
                           groups.input_row_step,
                           groups.input_group_step};
      check_launch(op, float8_rows(how, current_stream(x)));
    }
    args.a.data = staged.held.const_data_ptr();
    args.a.row_bytes = row_bytes;
    groups.input = data<float>(scales);
    groups.input_columns = extent(group > 0 ? group : 1);
  } else {
    staged = stage_input(op, x, WeightKind::kFloat8, std::nullopt, rows, args);
  }
  run_gemm(op, WeightKind::kFloat8, staged.dtype, args, x);
  return out;
}

Tensor fp8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                const Block& weight_block, int64_t out_features, const OptionalTensor& input_scale,
                const OptionalBlock& input_block, const OptionalTensor& bias) {
  constexpr auto kOp = "fp8_gemm";
  const Fp8Grid grid = check_fp8_arguments(kOp, x, packed, weight_scale, weight_block, out_features,
                                           input_scale, input_block, bias);
  const auto guard = use_device_of(x);
  return fp8_product(kOp, x, packed, weight_scale, grid, out_features, input_scale, input_block,
                     bias, {});
}

Tensor moe_fp8_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                    const Tensor& weight_scale, int64_t out_features, const Block& weight_block,
                    const OptionalTensor& input_scale, const OptionalBlock& input_block,
                    const OptionalTensor& bias, const OptionalTensor& row_scale) {
  constexpr auto kOp = "moe_fp8_gemm";
  const ExpertRows rows{offsets, row_scale};
  check_experts(kOp, x, rows, out_features);
  check_stack(kOp, "packed", packed, rows);
  check_stack(kOp, "weight_scale", weight_scale, rows);
  check_stack(kOp, "input_scale", input_scale, rows);
  check_stack(kOp, "bias", bias, rows);
  Fp8Grid grid = {1, 1, 1};
  if (rows.count() > 0) {
    grid = check_fp8_arguments("fp8_gemm", x, first_part(packed), first_part(weight_scale),
                               weight_block, out_features, first_number(input_scale), input_block,
                               first_part(bias));
  }
  const auto guard = use_device_of(x);
  return fp8_product(kOp, x, packed, weight_scale, grid, out_features, input_scale, input_block,
                     bias, rows);
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("fp8_gemm", TORCH_BOX(&qk::cuda::ops::fp8_gemm));
  m.impl("moe_fp8_gemm", TORCH_BOX(&qk::cuda::ops::moe_fp8_gemm));
}
