// gram_accumulate on the CPU.
#include "cpu/gram.h"

#include <algorithm>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

constexpr int64_t kTokens = 256;  // at a time: a stripe of so many stays in the L1 cache
constexpr int64_t kPanel = 16, kSquare = 64;

// The upper half of g onto the lower, square by square.
void mirror(float* g, int64_t n) {
  torch::stable::parallel_for(0, (n + kSquare - 1) / kSquare, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kSquare; i < std::min(n, end * kSquare); i += kSquare) {
      for (int64_t j = 0; j <= i; j += kSquare) {
        for (int64_t r = i; r < std::min(n, i + kSquare); ++r) {
          for (int64_t c = j; c < std::min(r, j + kSquare); ++c) g[r * n + c] = g[c * n + r];
        }
      }
    }
  });
}

}  // namespace

void gram_accumulate(const Tensor& x, const Tensor& g) {
  constexpr auto kOp = "gram_accumulate";
  check(x.dim() == 2, kOp, "x must be 2-D [tokens, columns], got ", x.dim(), "-D");
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  const int64_t tokens = x.size(0), cols = x.size(1);
  check(g.dim() == 2 && g.size(0) == cols && g.size(1) == cols &&
            g.scalar_type() == ScalarType::Float,
        kOp, "g must be torch.float32 [", cols, ", ", cols, "], x's columns squared, got ",
        name_of(g.scalar_type()), " ", text_of(g.sizes()));
  check(g.is_contiguous(), kOp, "g must be contiguous, got strides ", text_of(g.strides()));
  if (tokens == 0 || cols == 0) return;

  const GramKernels& kernels = gram_kernels();
  const DType dtype = dtype_of(kOp, x.scalar_type());
  const int64_t stripes = (cols + kernels.tile_cols - 1) / kernels.tile_cols;
  const int64_t panels = stripes * kernels.tile_cols / kPanel, words = kPanel * kTokens;
  Tensor packed = output(x, {panels, words}, ScalarType::Float);
  float* const words_of = data<float>(packed);
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const int64_t n = std::min(kTokens, tokens - t);
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        if (p * kPanel < cols) {
          kernels.pack(dtype, element(x, t * x.stride(0)), x.stride(0), n, p * kPanel, cols,
                       words_of + p * words);
        } else {
          std::fill_n(words_of + p * words, words, 0.0f);
        }
      }
    });
    // A stripe has the more rows the further right it is: each task gets one from either end.
    torch::stable::parallel_for(0, (stripes + 1) / 2, 1, [&](int64_t begin, int64_t end) {
      const auto stripe = [&](int64_t s) {
        kernels.stripe(dtype, words_of, words, n, s * kernels.tile_cols, cols, data<float>(g));
      };
      for (int64_t s = begin; s < end; ++s) {
        stripe(s);
        if (stripes - 1 - s != s) stripe(stripes - 1 - s);
      }
    });
  }
  mirror(data<float>(g), cols);
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("gram_accumulate", TORCH_BOX(&qk::cpu::gram_accumulate));
}
