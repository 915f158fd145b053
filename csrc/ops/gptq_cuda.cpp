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
  check(!(status & kSweepBadDiagonal), kOp, "factor's diagonal must be positive and finite");
  check(!(status & kSweepBadWeight), kOp, "w holds NaN or infinities: is the checkpoint damaged?");
  check(!(status & kSweepBadLoss), kOp,
        "the loss is not finite: factor holds NaN or infinities, or a scale does");
}

// Columns [first, end), which have made up for all before `first` if `begin` is not 0.
void round_columns(const Sweep& sweep, int begin, int first, int end, cudaStream_t stream) {
  for (int at = first; at < end; at += kSweepCols) {
    const int width = std::min(kSweepCols, end - at);
    check_launch(kOp, sweep_update(sweep, at, width, begin, at, stream));
    check_launch(kOp, sweep_stripe(sweep, at, width, stream));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gptq_sweep(
    const Tensor& w, const Tensor& factor, const OptionalTensor& scale,
    const OptionalTensor& zero_point, int64_t group_size, int64_t q_min, int64_t q_max,
    bool symmetric, double divisor, ScalarType scale_dtype, const OptionalTensor& g_idx,
    double search_range, int64_t search_steps, bool signs, int64_t float_bits) {
  const SweepShape shape =
      check_sweep(kOp, {w, factor, scale, zero_point, g_idx, group_size, q_min, q_max, scale_dtype,
                        search_range, search_steps, symmetric, signs, float_bits});
  check(on_device(w), kOp, "w must be on a CUDA device");
  check_same_device(kOp, "factor", factor, w);
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
  const Tensor diagonal = new_tensor(w, {shape.factors, shape.cols}, ScalarType::Float);
  // Scales found in the sweep: a group at a time, all of which first makes up for what is before
  // it.
  const bool fit = !scale && group_size != -1;
  const int step = fit ? size : std::min(kSweepCols, cols);
  const int64_t share_stride = (step + 7) / 8 * 8;  // as many columns as are summed at a time
  const Tensor share = new_tensor(w, {shape.factors, shape.cols, share_stride}, ScalarType::Float);
  Tensor status = new_tensor(w, {1}, ScalarType::Int);
  torch::stable::zero_(status);
  Sweep sweep{static_cast<int>(shape.batch),
              static_cast<int>(shape.rows),
              cols,
              static_cast<int>(shape.groups),
              static_cast<int>(shape.factors),
              static_cast<const float*>(w.const_data_ptr()),
              w.stride(-2),
              shape.batched ? w.stride(0) : 0,
              static_cast<const float*>(factor.const_data_ptr()),
              factor.stride(-2),
              shape.factors == 1 ? 0 : factor.stride(0),
              data<float>(diagonal),
              data<float>(values),
              stride,
              data<float>(share),
              share_stride,
              0,
              g_idx ? static_cast<const int*>(g_idx->const_data_ptr()) : nullptr,
              size,
              data<float>(out_scale),
              with_zero ? data<int8_t>(out_zero) : nullptr,
              data<int8_t>(codes),
              data<float>(loss),
              data<int>(status),
              symmetric,
              signs,
              static_cast<float>(signs ? -static_cast<double>(q_min) : divisor),
              dtype_of(kOp, scale_dtype),
              static_cast<int>(q_min),
              static_cast<int>(q_max),
              static_cast<int>(float_bits),
              search_range,
              static_cast<int>(search_steps)};
  const Tensor workspace =
      new_tensor(w, {fit ? sweep_fit_workspace(sweep, size) : 0}, ScalarType::Float);
  const cudaStream_t stream = current_stream(w);
  check_launch(kOp, sweep_prepare(sweep, stream));
  if (!scale && !fit) check_launch(kOp, sweep_fit(sweep, 0, 0, cols, false, nullptr, stream));
  for (int first = 0, group = 0; first < cols; first += step, ++group) {
    const int width = std::min(step, cols - first);
    sweep.origin = first;
    check_launch(kOp, sweep_share(sweep, width, stream));
    if (fit) {
      check_launch(kOp, sweep_update(sweep, first, width, 0, first, stream));
      check_launch(kOp,
                   sweep_fit(sweep, group, first, width, true, data<float>(workspace), stream));
    }
    round_columns(sweep, fit ? first : 0, first, first + width, stream);
  }
  check_status(fetch(status));
  return {codes, out_scale, out_zero, loss};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("gptq_sweep", TORCH_BOX(&qk::cuda::ops::gptq_sweep)); }
