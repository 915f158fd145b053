// gram_accumulate, gram_upper and mirror_upper on the CPU.
#include "cpu/gram.h"

#include <algorithm>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

constexpr int64_t kTokens = 1024;  // at a time: a stripe of so many stays in the L2 cache

using Optional = std::optional<Tensor>;

void check_arguments(const char* op, const Tensor& x, const Optional& mask, const Tensor& g,
                     const Optional& channels) {
  check(x.dim() == 2, op, "x must be 2-D [tokens, columns], got ", x.dim(), "-D");
  check_float(op, "x", x);
  check_rows(op, "x", x);
  const int64_t tokens = x.size(0), cols = x.size(1);
  check(g.dim() == 2 && g.size(0) == cols && g.size(1) == cols &&
            g.scalar_type() == ScalarType::Float,
        op, "g must be torch.float32 [", cols, ", ", cols, "], x's columns squared, got ",
        name_of(g.scalar_type()), " ", text_of(g.sizes()));
  check(g.is_contiguous(), op, "g must be contiguous, got strides ", text_of(g.strides()));
  if (mask) {
    check(mask->dim() == 1 && mask->size(0) == tokens && mask->scalar_type() == ScalarType::Bool,
          op, "mask must be torch.bool [", tokens, "], a number per token, got ",
          name_of(mask->scalar_type()), " ", text_of(mask->sizes()));
  }
  if (channels) {
    check(channels->dim() == 2 && channels->size(0) == 3 && channels->size(1) == cols &&
              channels->scalar_type() == ScalarType::Float,
          op, "channels must be torch.float32 [3, ", cols, "], got ",
          name_of(channels->scalar_type()), " ", text_of(channels->sizes()));
    check(channels->is_contiguous(), op, "channels must be contiguous, got strides ",
          text_of(channels->strides()));
  }
}

// The tokens that count.
std::vector<int64_t> tokens_of(int64_t n, const Optional& mask) {
  std::vector<int64_t> tokens;
  tokens.reserve(n);
  for (int64_t t = 0; t < n; ++t) {
    if (!mask || *reinterpret_cast<const bool*>(element(*mask, t * mask->stride(0)))) {
      tokens.push_back(t);
    }
  }
  return tokens;
}

// The upper half of g from these tokens of x; false if there are none.
bool add_up(const char* op, const Tensor& x, const Optional& mask, const Tensor& g,
            const Optional& channels, bool fresh) {
  const std::vector<int64_t> tokens = tokens_of(x.size(0), mask);
  const int64_t count = static_cast<int64_t>(tokens.size()), cols = x.size(1);
  if (count == 0 || cols == 0) return false;
  const GramKernels& kernels = gram_kernels();
  const GramInput input = {dtype_of(op, x.scalar_type()), element(x, 0), x.stride(0), cols,
                           tokens.data()};
  const int64_t width = kernels.width, stripes = (cols + width - 1) / width;
  const int64_t words = width * std::min(kTokens, (count + 1) / 2 * 2);
  Tensor packed = output(x, {stripes, words}, ScalarType::Float);
  float* const first = data<float>(packed);
  for (int64_t t = 0; t < count; t += kTokens) {
    const int64_t end = std::min(count, t + kTokens);
    parallel_queue(stripes, [&](int64_t s) {
      kernels.pack(input, t, end, s * width, first + s * words,
                   channels ? data<float>(*channels) : nullptr);
    });
    // A stripe has the more rows the further right it is: those go first.
    parallel_queue(stripes, [&](int64_t i) {
      const int64_t s = stripes - 1 - i;
      kernels.multiply(input.dtype, first, words, end - t, s * width, cols, fresh && t == 0,
                       data<float>(g));
    });
  }
  return true;
}

void mirror(const Tensor& g) {
  const int64_t cols = g.size(0), squares = (cols + kMirrorRows - 1) / kMirrorRows;
  parallel_queue(squares, [&](int64_t i) {
    gram_kernels().mirror(data<float>(g), cols, (squares - 1 - i) * kMirrorRows);
  });
}

}  // namespace

void gram_accumulate(const Tensor& x, const Optional& mask, const Tensor& g,
                     const Optional& channels) {
  constexpr auto kOp = "gram_accumulate";
  check_arguments(kOp, x, mask, g, channels);
  if (add_up(kOp, x, mask, g, channels, false)) mirror(g);
}

void gram_upper(const Tensor& x, const Tensor& g, const Optional& channels, bool fresh) {
  constexpr auto kOp = "gram_upper";
  check_arguments(kOp, x, std::nullopt, g, channels);
  check(!fresh || x.size(0) > 0, kOp, "x must have a token to make a fresh g of, got none");
  add_up(kOp, x, std::nullopt, g, channels, fresh);
}

void mirror_upper(const Tensor& g) {
  constexpr auto kOp = "mirror_upper";
  check(g.dim() == 2 && g.size(0) == g.size(1) && g.scalar_type() == ScalarType::Float, kOp,
        "g must be a square of torch.float32, got ", name_of(g.scalar_type()), " ",
        text_of(g.sizes()));
  check(g.is_contiguous(), kOp, "g must be contiguous, got strides ", text_of(g.strides()));
  mirror(g);
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("gram_accumulate", TORCH_BOX(&qk::cpu::gram_accumulate));
  m.impl("gram_upper", TORCH_BOX(&qk::cpu::gram_upper));
  m.impl("mirror_upper", TORCH_BOX(&qk::cpu::mirror_upper));
}
