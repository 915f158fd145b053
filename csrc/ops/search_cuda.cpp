// mse_scale on CUDA. It waits for the device at its end: values that are not finite are told by the
// call that was given them.
#include "cuda/common/search.h"

#include <tuple>

#include "ops/reduce_cuda.h"
#include "ops/search_check.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "mse_scale";

void check_arguments(int64_t q_min, int64_t q_max, bool symmetric, double divisor, double norm,
                     double search_range, int64_t search_steps) {
  check_search_codes(kOp, q_min, q_max, symmetric, divisor);
  check(norm > 0.0 && norm <= 8.0, kOp, "norm must be above 0 and at most 8, got ", norm);
  check(search_range >= 0.0 && search_range < 1.0, kOp, "search_range must be in [0, 1), got ",
        search_range);
  check(search_steps >= 0 && search_steps <= 1000, kOp, "search_steps must be 0 to 1000, got ",
        search_steps);
}

std::tuple<Tensor, Tensor> mse_scale(const Tensor& x, IntList block,
                                     const OptionalTensor& importance, int64_t q_min, int64_t q_max,
                                     bool symmetric, double divisor, ScalarType scale_dtype,
                                     double norm, double search_range, int64_t search_steps,
                                     bool signs) {
  const Matrix matrix = float_matrix(kOp, x);
  const Blocks blocks = blocks_of(kOp, x, check_matrix(kOp, x, block));
  check(!signs || (symmetric && q_min < 0), kOp,
        "signs are for symmetric codes with a negative q_min");
  if (signs) divisor = -static_cast<double>(q_min);
  check_arguments(q_min, q_max, symmetric, divisor, norm, search_range, search_steps);
  check_scale_dtype(kOp, scale_dtype);
  if (importance) {
    check(importance->dim() == 1 && importance->size(0) == matrix.cols &&
              importance->scalar_type() == ScalarType::Float,
          kOp, "importance must be float32 [", matrix.cols, "], one value a column of x");
    check_same_device(kOp, "importance", *importance, x);
  }
  const ScaleSearch how{static_cast<int>(q_min),
                        static_cast<int>(q_max),
                        symmetric,
                        static_cast<float>(divisor),
                        dtype_of(kOp, scale_dtype),
                        static_cast<float>(norm),
                        search_range,
                        static_cast<int>(search_steps),
                        signs,
                        importance ? data_of<float>(kOp, "importance", *importance) : nullptr};
  check(int64_t{blocks.rows} * blocks.cols <= kMaxExtent, kOp, "blocks of ", blocks.rows, " x ",
        blocks.cols, " elements are too large; the CUDA kernels take ", kMaxExtent);
  const auto guard = use_device_of(x);
  const Tensor scale = new_tensor(x, grid_shape(blocks), ScalarType::Float);
  const Tensor zero_point =
      new_tensor(x, symmetric ? Shape{0} : grid_shape(blocks), ScalarType::Char);
  if (scale.numel() == 0 || x.numel() == 0) return {scale, zero_point};
  Tensor status = new_tensor(x, {1}, ScalarType::Int);
  torch::stable::zero_(status);
  const cudaStream_t stream = current_stream(x);
  if (importance)
    check_launch(kOp, check_importance(how.importance, matrix.cols, data<int>(status), stream));
  int8_t* const zeros = symmetric ? nullptr : data<int8_t>(zero_point);
  if (int64_t{blocks.rows} * blocks.cols <= kLargestSearch) {
    check_launch(kOp, search_scales(matrix, blocks, how, data<float>(scale), zeros,
                                    data<int>(status), stream));
  } else {
    const Tensor low = new_tensor(x, symmetric ? Shape{0} : grid_shape(blocks), ScalarType::Float);
    const Tensor high = new_tensor(x, grid_shape(blocks), ScalarType::Float);
    reduce_blocks(kOp, matrix, blocks,
                  {symmetric ? data<float>(high) : nullptr, symmetric ? nullptr : data<float>(low),
                   symmetric ? nullptr : data<float>(high)},
                  x);
    const Tensor workspace =
        new_tensor(x, {search_workspace(matrix, blocks, how)}, ScalarType::Double);
    check_launch(kOp,
                 search_large_scales(matrix, blocks, how, {data<float>(low), data<float>(high)},
                                     data<double>(workspace), data<float>(scale), zeros,
                                     data<int>(status), stream));
  }
  const int bad = fetch(status);
  check(!(bad & kBadImportance), kOp, "importance must be finite and not negative");
  check(!(bad & kBadValue), kOp, "x must be finite");
  return {scale, zero_point};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("mse_scale", TORCH_BOX(&qk::cuda::ops::mse_scale)); }
