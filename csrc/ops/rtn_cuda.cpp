// rtn_int and rtn_fp8 on CUDA.
#include "ops/rtn_cuda.h"

#include <tuple>

#include "cuda/common/quantize.h"
#include "cuda/common/scale.h"
#include "ops/reduce_cuda.h"

namespace qk::cuda {

void round_to_nearest(const char* op, const Matrix& x, const Blocks& blocks, const RtnArgs& args,
                      const Tensor& like, const Tensor& out, const Tensor& scale,
                      const Tensor& zero_point) {
  const cudaStream_t stream = current_stream(like);
  float* scales = data<float>(scale);
  int8_t* zero_points = args.symmetric ? nullptr : data<int8_t>(zero_point);
  if (rtn_fits(blocks)) {
    check_launch(op, rtn(x, blocks, args, out.mutable_data_ptr(), scales, zero_points, stream));
    return;
  }
  const int64_t n = count(blocks);
  const Tensor first = new_tensor(like, {n}, ScalarType::Float);
  if (args.symmetric) {
    reduce_blocks(op, x, blocks, {data<float>(first), nullptr, nullptr}, like);
    check_launch(op, make_symmetric_scale(data<float>(first), n, args.divisor, args.scale_dtype,
                                          scales, stream));
  } else {
    const Tensor second = new_tensor(like, {n}, ScalarType::Float);
    reduce_blocks(op, x, blocks, {nullptr, data<float>(first), data<float>(second)}, like);
    check_launch(op,
                 make_asymmetric_scale(data<float>(first), data<float>(second), n, args.q_min,
                                       args.q_max, args.scale_dtype, scales, zero_points, stream));
  }
  const QuantizeArgs quantize_args{blocks,     scales,     zero_points,   args.code,
                                   args.q_min, args.q_max, args.pack_bits};
  check_launch(op, quantize(x, quantize_args, out.mutable_data_ptr(), stream));
}

RtnArgs fp8_args(const char* op, ScalarType dtype) {
  check_fp8_dtype(op, dtype);
  const DType code = dtype_of(op, dtype);
  return {code, 0, 0, true, code == DType::kFloat8E4M3 ? 448.0f : 57344.0f, DType::kFloat32, 0};
}

namespace ops {
namespace {

std::tuple<Tensor, Tensor, Tensor> rtn_int(const Tensor& x, IntList block, int64_t q_min,
                                           int64_t q_max, bool symmetric, double divisor,
                                           ScalarType scale_dtype, int64_t pack_bits) {
  constexpr auto kOp = "rtn_int";
  const Matrix matrix = float_matrix(kOp, x);
  const Blocks blocks = blocks_of(kOp, x, check_matrix(kOp, x, block));
  check_code_range(kOp, q_min, q_max);
  check(pack_bits == 0 || pack_bits == 4 || pack_bits == 8, kOp,
        "pack_bits must be 0, 4 or 8, got ", pack_bits);
  check_scale_dtype(kOp, scale_dtype);
  const RtnArgs args{DType::kInt8,
                     static_cast<int>(q_min),
                     static_cast<int>(q_max),
                     symmetric,
                     static_cast<float>(divisor),
                     dtype_of(kOp, scale_dtype),
                     static_cast<int>(pack_bits)};
  const auto guard = use_device_of(x);
  const int64_t words = (matrix.cols * pack_bits + 31) / 32;
  const Tensor codes = pack_bits == 0 ? new_tensor(x, {matrix.rows, matrix.cols}, ScalarType::Char)
                                      : new_tensor(x, {matrix.rows, words}, ScalarType::Int);
  const Tensor scale = new_tensor(x, grid_shape(blocks), ScalarType::Float);
  const Tensor zero_point =
      new_tensor(x, symmetric ? Shape{0} : grid_shape(blocks), ScalarType::Char);
  round_to_nearest(kOp, matrix, blocks, args, x, codes, scale, zero_point);
  return {codes, scale, zero_point};
}

std::tuple<Tensor, Tensor> rtn_fp8(const Tensor& x, IntList block, ScalarType dtype) {
  constexpr auto kOp = "rtn_fp8";
  const Matrix matrix = float_matrix(kOp, x);
  const Blocks blocks = blocks_of(kOp, x, check_matrix(kOp, x, block));
  const RtnArgs args = fp8_args(kOp, dtype);
  const auto guard = use_device_of(x);
  const Tensor codes = new_tensor(x, {matrix.rows, matrix.cols}, dtype);
  const Tensor scale = new_tensor(x, grid_shape(blocks), ScalarType::Float);
  round_to_nearest(kOp, matrix, blocks, args, x, codes, scale, scale);
  return {codes, scale};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("rtn_int", TORCH_BOX(&qk::cuda::ops::rtn_int));
  m.impl("rtn_fp8", TORCH_BOX(&qk::cuda::ops::rtn_fp8));
}
