// gptq_sweep on CUDA. It waits for the device at its end: what is wrong with the numbers is told by
// the call that was given them.
#include "cuda/common/gptq.h"

#include <algorithm>
#include <tuple>

#include "ops/cuda_tensor.h"
#include "ops/gptq.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "gptq_sweep";

void check_status(int status) {
  check(!(status & kSweepBadGroup), kOp, "g_idx must lie within the groups");
  check(!(status & kSweepBadDiagonal), kOp, "u's diagonal must be positive and finite");
  check(!(status & kSweepBadWeight), kOp, "w holds NaN or infinities: is the checkpoint damaged?");
  check(!(status & kSweepBadLoss), kOp,
        "the loss is not finite: u holds NaN or infinities, or a scale does");
}

// Columns [first, end), after the errors of [begin, first).
void run(const Sweep& sweep, int begin, int first, int end, int step, bool fit,
         cudaStream_t stream) {
  for (int at = first; at < end; at += step) {
    const int width = std::min(step, end - at);
    check_launch(kOp, sweep_update(sweep, at, width, begin, at, stream));
    check_launch(kOp, sweep_stripe(sweep, at, width, fit, stream));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gptq_sweep(
    const Tensor& w, const Tensor& u, const OptionalTensor& scale, const OptionalTensor& zero_point,
    int64_t group_size, int64_t q_min, int64_t q_max, bool symmetric, double divisor,
    ScalarType scale_dtype, const OptionalTensor& g_idx, double search_range,
    int64_t search_steps) {
  const SweepShape shape = check_sweep(kOp, {w, u, scale, zero_point, g_idx, group_size, q_min,
                                             q_max, scale_dtype, search_range, search_steps});
  check(on_device(w), kOp, "w must be on a CUDA device");
  check_same_device(kOp, "u", u, w);
  if (scale) check_same_device(kOp, "scale", *scale, w);
  if (zero_point) check_same_device(kOp, "zero_point", *zero_point, w);
  if (g_idx) check_same_device(kOp, "g_idx", *g_idx, w);
  check_extent(kOp, "w", shape.batch * shape.rows, shape.cols);
  check(search_steps <= kMaxExtent, kOp, "search_steps are too many");
  const auto guard = use_device_of(w);
  const bool with_zero = scale ? zero_point.has_value() : !symmetric;
  const Tensor codes = new_tensor(w, shape.with(shape.cols), ScalarType::Char);
  Tensor out_scale = new_tensor(w, shape.with(shape.groups), ScalarType::Float);
  Tensor out_zero =
      new_tensor(w, with_zero ? shape.with(shape.groups) : Shape{0}, ScalarType::Char);
  Tensor loss = new_tensor(w, shape.with(-1), ScalarType::Float);
  if (codes.numel() == 0) {
    torch::stable::zero_(loss);
    return {codes, out_scale, out_zero, loss};
  }
  if (scale) torch::stable::copy_(out_scale, *scale);
  if (zero_point) torch::stable::copy_(out_zero, *zero_point);

  const int cols = static_cast<int>(shape.cols),
            size = static_cast<int>(std::min(shape.size, shape.cols));
  const int64_t stride = (shape.cols + 3) / 4 * 4;
  const Tensor values = new_tensor(w, {shape.batch * shape.rows, stride}, ScalarType::Float);
  const Tensor inverse = new_tensor(w, {shape.factors, shape.cols}, ScalarType::Float);
  Tensor status = new_tensor(w, {1}, ScalarType::Int);
  torch::stable::zero_(status);
  const bool shared = shape.factors == 1;
  const Sweep sweep{static_cast<int>(shape.batch),
                    static_cast<int>(shape.rows),
                    cols,
                    static_cast<int>(shape.groups),
                    data<float>(values),
                    stride,
                    static_cast<const float*>(u.const_data_ptr()),
                    u.stride(-2),
                    shared ? 0 : u.stride(0),
                    data<float>(inverse),
                    shared ? 0 : shape.cols,
                    g_idx ? static_cast<const int*>(g_idx->const_data_ptr()) : nullptr,
                    size,
                    data<float>(out_scale),
                    with_zero ? data<int8_t>(out_zero) : nullptr,
                    data<int8_t>(codes),
                    data<float>(loss),
                    data<int>(status),
                    symmetric,
                    static_cast<float>(divisor),
                    dtype_of(kOp, scale_dtype),
                    static_cast<int>(q_min),
                    static_cast<int>(q_max),
                    search_range,
                    static_cast<int>(search_steps)};
  const cudaStream_t stream = current_stream(w);
  check_launch(
      kOp, sweep_prepare(sweep, static_cast<const float*>(w.const_data_ptr()), w.stride(-2),
                         shape.batched ? w.stride(0) : 0, static_cast<int>(shape.factors), stream));
  if (scale || shape.groups == 1) {
    if (!scale) check_launch(kOp, sweep_fit(sweep, 0, 0, cols, stream));
    run(sweep, 0, 0, cols, kSweepCols, false, stream);
  } else if (size <= kSweepCols && size % kSweepFit == 0) {
    run(sweep, 0, 0, cols, kSweepCols / size * size, true, stream);
  } else {  // a group at a time: all of it takes the earlier errors before its scale is found
    for (int group = 0, first = 0; first < cols; ++group, first += size) {
      const int width = std::min(size, cols - first);
      check_launch(kOp, sweep_update(sweep, first, width, 0, first, stream));
      check_launch(kOp, sweep_fit(sweep, group, first, width, stream));
      run(sweep, first, first, first + width, kSweepCols, false, stream);
    }
  }
  check_status(fetch(status));
  return {codes, out_scale, out_zero, loss};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("gptq_sweep", TORCH_BOX(&qk::cuda::ops::gptq_sweep)); }
