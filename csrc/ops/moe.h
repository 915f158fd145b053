// What the GEMMs over experts share: whose rows are whose, and how the work is spread over threads.
#pragma once

#include "cpu/moe.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

// The single ops, which check what an expert's part must be.
Tensor w8a8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                 int64_t out_features, const std::optional<Tensor>& input_scale,
                 const std::optional<Tensor>& input_zero_point, bool symmetric,
                 const std::optional<Tensor>& bias);
Tensor w4a8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                 int64_t out_features, int64_t group_size,
                 const std::optional<Tensor>& weight_zero_point, const std::optional<Tensor>& bias);
Tensor wna16_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                  const std::optional<Tensor>& weight_zero_point, const std::optional<Tensor>& perm,
                  const std::optional<Tensor>& bias, int64_t num_bits, int64_t out_features,
                  int64_t group_size);

// An expert with rows, by its number.
struct Expert {
  int64_t index, begin, end;  // of x
  int64_t rows() const { return end - begin; }
};

// A product over experts. Rows of y are `stride` elements apart.
struct Moe {
  const char* op;
  DType dtype;
  const char* x;
  int64_t x_stride, rows, in_features, out_features;
  std::vector<Expert> experts;
  Tensor y;
  const float* row_scale;  // or null

  int64_t element_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
  const char* row(int64_t r) const { return x + r * x_stride * element_bytes(); }
  int64_t threads() const;
};

// The arguments that all have, checked; y is allocated.
Moe check_moe(const char* op, const Tensor& x, const Tensor& offsets, int64_t out_features,
              const std::optional<Tensor>& row_scale);
// `stack` has one part for each expert of `offsets`.
void check_stack(const Moe& moe, const char* name, const std::optional<Tensor>& stack,
                 const Tensor& offsets);

// The part of expert `e` as a tensor: only for the checks, which the first expert's is enough for.
inline Tensor part(const Tensor& stack, int64_t e) { return torch::stable::select(stack, 0, e); }
inline std::optional<Tensor> part(const std::optional<Tensor>& stack, int64_t e) {
  return stack ? std::optional<Tensor>(part(*stack, e)) : std::nullopt;
}
// No rows of x, for a call that does nothing but check.
inline Tensor no_rows(const Tensor& x) {
  Tensor copy = x;
  return torch::stable::narrow(copy, 0, 0, 0);
}
// Where the part of expert `e` begins.
inline const char* part_data(const Tensor& stack, int64_t e) {
  return element(stack, e * (stack.size(0) ? stack.numel() / stack.size(0) : 0));
}

// Rows, or tiles, [begin, end) of expert `expert` of Moe::experts, and a panel of its weight.
struct MoePiece {
  int64_t expert, begin, end, panel;
};

// count(expert) units of each expert in pieces of at most `most`, balanced, for each of `panels`.
template <typename Count>
std::vector<MoePiece> moe_pieces(const Moe& moe, int64_t most, int64_t panels, const Count& count) {
  std::vector<MoePiece> pieces;
  for (int64_t e = 0; e < static_cast<int64_t>(moe.experts.size()); ++e) {
    const int64_t units = count(moe.experts[e]), parts = (units + most - 1) / most;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t i = 0; i < parts; ++i) {
        pieces.push_back({e, units * i / parts, units * (i + 1) / parts, p});
      }
    }
  }
  return pieces;
}

// prepare(piece, thread) for pieces of x, then multiply(piece, the piece after it or null, thread),
// which gives the rows of y that are done: these are scaled.
template <typename Prepare, typename Multiply>
void moe_product(const Moe& moe, int64_t panel_cols, const std::vector<MoePiece>& input,
                 const Prepare& prepare, const std::vector<MoePiece>& output,
                 const Multiply& multiply) {
  const int64_t count = static_cast<int64_t>(output.size());
  char* const y = data<char>(moe.y);
  parallel_stages(
      moe.threads(), [](int64_t) {}, static_cast<int64_t>(input.size()),
      [&](int64_t i, int64_t thread) { prepare(input[i], thread); }, count,
      [&](int64_t i, int64_t next, int64_t thread) {
        const MoePiece& piece = output[i];
        const auto [begin, end] = multiply(piece, next < count ? &output[next] : nullptr, thread);
        if (!moe.row_scale) return;
        const int64_t column = piece.panel * panel_cols;
        moe_kernels().scale_rows(moe.dtype, y + column * moe.element_bytes(), moe.out_features,
                                 begin, end, std::min(panel_cols, moe.out_features - column),
                                 moe.row_scale);
      });
}

}  // namespace qk::cpu
