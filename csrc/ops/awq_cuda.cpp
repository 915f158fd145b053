// awq_search on CUDA.
#include "cuda/common/awq.h"

#include <algorithm>
#include <vector>

#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "awq_search";
constexpr int64_t kErrorBytes = int64_t{512} << 20;  // of candidates at a time, at least one

void check_arguments(const Tensor& w, const Tensor& g, const Tensor& scales,
                     const std::vector<double>& clip, int64_t group_size, int64_t q_min,
                     int64_t q_max, ScalarType scale_dtype) {
  const int64_t cols = w.size(1);
  check(g.dim() == 2 && g.size(0) == cols && g.size(1) == cols &&
            g.scalar_type() == ScalarType::Float,
        kOp, "g must be torch.float32 [", cols, ", ", cols, "], got ", name_of(g.scalar_type()),
        " ", text_of(g.sizes()));
  check_rows(kOp, "g", g);
  check_same_device(kOp, "g", g, w);
  check(scales.dim() == 2 && scales.size(1) == cols && scales.scalar_type() == ScalarType::Float,
        kOp, "scales must be torch.float32 [candidates, ", cols, "], got ",
        name_of(scales.scalar_type()), " ", text_of(scales.sizes()));
  check_rows(kOp, "scales", scales);
  check_same_device(kOp, "scales", scales, w);
  check(std::all_of(clip.begin(), clip.end(), [](double c) { return c > 0.0 && c <= 1.0; }), kOp,
        "clip ratios must lie in (0, 1]");
  check(group_size == -1 || group_size > 0, kOp,
        "group_size must be positive, or -1 for the whole row, got ", group_size);
  check_code_range(kOp, q_min, q_max);
  check_scale_dtype(kOp, scale_dtype);
}

Tensor awq_search(const Tensor& w, const Tensor& g, const Tensor& scales,
                  const std::vector<double>& clip, int64_t group_size, int64_t q_min, int64_t q_max,
                  bool symmetric, double divisor, ScalarType scale_dtype) {
  check_float(kOp, "w", w);
  const Matrix matrix = matrix_of(kOp, "w", w);
  check_arguments(w, g, scales, clip, group_size, q_min, q_max, scale_dtype);
  const int clips = static_cast<int>(clip.size());
  check(scales.size(0) * clips <= kMaxExtent, kOp, "there are too many candidates");
  const int all = static_cast<int>(scales.size(0)) * clips;
  const auto guard = use_device_of(w);
  Tensor losses = new_tensor(w, {scales.size(0), clips}, ScalarType::Float);
  if (all == 0 || w.numel() == 0) {
    torch::stable::zero_(losses);
    return losses;
  }
  Tensor ratios = new_tensor(w, {clips}, ScalarType::Float);
  for (int i = 0; i < clips; ++i) {
    Tensor one = torch::stable::narrow(ratios, 0, i, 1);
    torch::stable::fill_(one, clip[i]);
  }
  const int64_t size = group_size == -1 ? matrix.cols : group_size;
  const AwqQuantizer how{static_cast<int>(std::min<int64_t>(size, matrix.cols)),
                         static_cast<int>(q_min),
                         static_cast<int>(q_max),
                         symmetric,
                         static_cast<float>(divisor),
                         dtype_of(kOp, scale_dtype)};
  check(matrix.rows * ((matrix.cols + how.group - 1) / int64_t{how.group}) <= kMaxExtent, kOp,
        "w has too many groups; the CUDA kernels take at most ", kMaxExtent);
  const int64_t stride = (matrix.cols + 3) / 4 * 4, each = matrix.rows * stride;
  const int64_t fitting = kErrorBytes / (each * static_cast<int64_t>(sizeof(float)));
  const int together = static_cast<int>(std::min<int64_t>(all, std::max<int64_t>(1, fitting)));
  const Tensor errors = new_tensor(w, {together, each}, ScalarType::Float);
  const Tensor workspace =
      new_tensor(w, {awq_workspace(together, matrix.rows, matrix.cols)}, ScalarType::Double);
  const cudaStream_t stream = current_stream(w);
  for (int first = 0; first < all; first += together) {
    const int count = std::min(together, all - first);
    const AwqCandidates candidates{first,
                                   count,
                                   static_cast<const float*>(scales.const_data_ptr()),
                                   scales.stride(0),
                                   data<float>(ratios),
                                   clips};
    check_launch(kOp, awq_errors(matrix, how, candidates, data<float>(errors), stride, stream));
    check_launch(kOp, awq_losses(data<float>(errors), stride, count, matrix.rows, matrix.cols,
                                 static_cast<const float*>(g.const_data_ptr()), g.stride(0),
                                 data<double>(workspace), data<float>(losses) + first, stream));
  }
  return losses;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("awq_search", TORCH_BOX(&qk::cuda::ops::awq_search)); }
