// pack_int32 and unpack_int32 on CUDA.
#include "cuda/common/pack.h"

#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

Tensor pack(const Tensor& codes, int64_t num_bits) {
  constexpr auto kOp = "pack_int32";
  check_packing(kOp, codes, ScalarType::Char, num_bits);
  const Matrix matrix = matrix_of(kOp, "codes", codes);
  const auto guard = use_device_of(codes);
  const Tensor words =
      new_tensor(codes, {matrix.rows, (matrix.cols * num_bits + 31) / 32}, ScalarType::Int);
  check_launch(kOp, pack_int32(matrix, static_cast<int>(num_bits), words.mutable_data_ptr(),
                               current_stream(codes)));
  return words;
}

Tensor unpack(const Tensor& packed, int64_t num_bits, int64_t cols) {
  constexpr auto kOp = "unpack_int32";
  check_packing(kOp, packed, ScalarType::Int, num_bits);
  const int32_t* words = data_of<int32_t>(kOp, "packed", packed);
  check_extent(kOp, "packed", packed.size(0), cols);
  const int64_t expected = (cols * num_bits + 31) / 32;
  check(cols >= 0 && packed.size(1) == expected, kOp, cols, " columns of ", num_bits, " bits take ",
        expected, " words a row, packed has ", packed.size(1));
  const auto guard = use_device_of(packed);
  const Tensor codes = new_tensor(packed, {packed.size(0), cols}, ScalarType::Char);
  check_launch(kOp, unpack_int32(words, static_cast<int>(packed.size(0)), static_cast<int>(cols),
                                 static_cast<int>(num_bits), codes.mutable_data_ptr(),
                                 current_stream(packed)));
  return codes;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("pack_int32", TORCH_BOX(&qk::cuda::ops::pack));
  m.impl("unpack_int32", TORCH_BOX(&qk::cuda::ops::unpack));
}
