// gram_accumulate on CUDA.
#include "cuda/common/gram.h"

#include <algorithm>

#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "gram_accumulate";

void gram_accumulate(const Tensor& x, const OptionalTensor& mask, const Tensor& g,
                     const OptionalTensor& channels) {
  Matrix tokens = float_matrix(kOp, x);
  const int cols = tokens.cols;
  check(g.dim() == 2 && g.size(0) == cols && g.size(1) == cols &&
            g.scalar_type() == ScalarType::Float,
        kOp, "g must be torch.float32 [", cols, ", ", cols, "], x's columns squared, got ",
        name_of(g.scalar_type()), " ", text_of(g.sizes()));
  check(g.is_contiguous(), kOp, "g must be contiguous, got strides ", text_of(g.strides()));
  check_same_device(kOp, "g", g, x);
  if (mask) {
    check(
        mask->dim() == 1 && mask->size(0) == tokens.rows && mask->scalar_type() == ScalarType::Bool,
        kOp, "mask must be torch.bool [", tokens.rows, "], a number per token, got ",
        name_of(mask->scalar_type()), " ", text_of(mask->sizes()));
    check_same_device(kOp, "mask", *mask, x);
  }
  if (channels) {
    check(channels->dim() == 2 && channels->size(0) == 3 && channels->size(1) == cols &&
              channels->scalar_type() == ScalarType::Float,
          kOp, "channels must be torch.float32 [3, ", cols, "], got ",
          name_of(channels->scalar_type()), " ", text_of(channels->sizes()));
    check(channels->is_contiguous(), kOp, "channels must be contiguous, got strides ",
          text_of(channels->strides()));
    check_same_device(kOp, "channels", *channels, x);
  }
  if (x.numel() == 0) return;
  const auto guard = use_device_of(x);
  const cudaStream_t stream = current_stream(x);
  TokenMask counted{mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
                    mask ? mask->stride(0) : 0};
  if (channels)
    check_launch(kOp, channel_statistics(tokens, counted, data<float>(*channels), stream));
  const int rows = tokens.rows;
  tokens.rows = std::min(kGramTokens, rows);
  const Tensor workspace = new_tensor(x, {gram_workspace(tokens)}, ScalarType::Float);
  for (int first = 0; first < rows; first += kGramTokens) {
    tokens.rows = std::min(kGramTokens, rows - first);
    check_launch(kOp, gram(tokens, counted, data<float>(g), data<float>(workspace), stream));
    tokens.data = static_cast<const char*>(tokens.data) +
                  kGramTokens * tokens.row_stride * static_cast<int64_t>(x.element_size());
    if (counted.data != nullptr) counted.data += kGramTokens * counted.stride;
  }
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("gram_accumulate", TORCH_BOX(&qk::cuda::ops::gram_accumulate)); }
