// pack_fp8 and fp8_gemm on the CPU.
#include "ops/fp8_gemm.h"

#include <memory>

#include "ops/panels.h"

namespace qk::cpu {
namespace {

using Optional = std::optional<Tensor>;

void check_input(const char* op, const Tensor& x, const Optional& scale,
                 const std::optional<Block>& block) {
  check(x.dim() == 2, op, "x must be 2-D [M, K], got ", x.dim(), "-D");
  check_float(op, "x", x);
  check_rows(op, "x", x);
  if (block) {
    const bool two = block->size() == 2;
    check(two && (((*block)[1] == -1 && ((*block)[0] == -1 || (*block)[0] == 1)) ||
                  ((*block)[0] == 1 && (*block)[1] > 0)),
          op,
          "input_block must be [-1, -1] (tensor), [1, -1] (token) or [1, columns of a group], got ",
          text_of({block->data(), block->size()}));
  }
  if (scale) {
    check(scale->scalar_type() == ScalarType::Float && scale->dim() == 1 && scale->size(0) == 1, op,
          "input_scale must be torch.float32 [1], got ", name_of(scale->scalar_type()), " ",
          text_of(scale->sizes()));
    check(!block || (*block)[0] == -1, op,
          "input_scale is one for the tensor: input_block must be [-1, -1] or None, got ",
          block ? text_of({block->data(), block->size()}) : "");
  }
}

void check_packed(const char* op, const Tensor& packed, int64_t out_features, int64_t cols) {
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
  const int64_t shape[] = {(out_features + kPanelCols - 1) / kPanelCols, fp8_panel_bytes(cols)};
  check(packed.scalar_type() == ScalarType::Char && packed.dim() == 2 &&
            packed.size(0) == shape[0] && packed.size(1) == shape[1] && packed.is_contiguous(),
        op, "packed must be what pack_fp8 makes of torch.float8_e4m3fn [", out_features, ", ", cols,
        "]: contiguous torch.int8 ", text_of({shape, 2}), ", got ", name_of(packed.scalar_type()),
        " ", text_of(packed.sizes()));
}

// y = bias, where there is nothing to sum up.
void fill_rows(Tensor& y, const Optional& bias) {
  if (!bias) {
    torch::stable::zero_(y);
    return;
  }
  for (int64_t r = 0; r < y.size(0); ++r) {
    Tensor row = torch::stable::select(y, 0, r);
    torch::stable::copy_(row, *bias);
  }
}

}  // namespace

Fp8Arguments check_fp8_gemm(const char* op, const Tensor& x, const Tensor& packed,
                            const Tensor& weight_scale, const Block& weight_block,
                            int64_t out_features, const Optional& input_scale,
                            const std::optional<Block>& input_block, const Optional& bias) {
  check_input(op, x, input_scale, input_block);
  const int64_t cols = x.size(1);
  check_packed(op, packed, out_features, cols);
  const auto good = [](int64_t size) { return size == -1 || size > 0; };
  check(weight_block.size() == 2 && good(weight_block[0]) && good(weight_block[1]), op,
        "weight_block must be [rows, cols], positive or -1 for the whole extent, got ",
        text_of({weight_block.data(), weight_block.size()}));
  const auto size_of = [](int64_t size, int64_t extent) {
    return std::max<int64_t>(1, size == -1 ? extent : size);
  };
  const int64_t rows = size_of(weight_block[0], out_features),
                columns = size_of(weight_block[1], cols);
  const int64_t shape[] = {(out_features + rows - 1) / rows, (cols + columns - 1) / columns};
  check(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 2 &&
            weight_scale.size(0) == shape[0] && weight_scale.size(1) == shape[1] &&
            weight_scale.is_contiguous(),
        op, "weight_scale must be contiguous torch.float32 ", text_of({shape, 2}),
        " for the weight [", out_features, ", ", cols, "] and weight_block ",
        text_of({weight_block.data(), weight_block.size()}), ", got ",
        name_of(weight_scale.scalar_type()), " ", text_of(weight_scale.sizes()));
  if (bias) {
    const ScalarType dtype = bias->scalar_type();
    check((dtype == ScalarType::Float || dtype == x.scalar_type()) && bias->dim() == 1 &&
              bias->size(0) == out_features && bias->is_contiguous(),
          op, "bias must be contiguous torch.float32 or x's dtype [", out_features, "], got ",
          name_of(dtype), " ", text_of(bias->sizes()));
  }
  Fp8Arguments result = {};
  result.weight = {reinterpret_cast<const uint8_t*>(element(packed, 0)),
                   out_features,
                   cols,
                   reinterpret_cast<const float*>(element(weight_scale, 0)),
                   shape[1],
                   rows,
                   columns};
  result.how = {input_scale || input_block, nullptr, cols};
  if (input_scale) {
    result.how.scale = reinterpret_cast<const float*>(element(*input_scale, 0));
  } else if (input_block) {
    result.tensor = (*input_block)[0] == -1;
    if ((*input_block)[1] > 0) result.how.group = (*input_block)[1];
  }
  return result;
}

Tensor fp8_tensor_scale(const Tensor& x) {
  return symmetric_scale(absmax(x, {-1, -1}), Float8E4M3::kMax, ScalarType::Float);
}

Tensor pack_fp8(const Tensor& codes) {
  constexpr auto kOp = "pack_fp8";
  check(codes.dim() == 2 && codes.scalar_type() == ScalarType::Float8_e4m3fn, kOp,
        "codes must be torch.float8_e4m3fn [N, K], got ", name_of(codes.scalar_type()), " ",
        text_of(codes.sizes()));
  check_rows(kOp, "codes", codes);
  const int64_t rows = codes.size(0), cols = codes.size(1),
                panels = (rows + kPanelCols - 1) / kPanelCols;
  Tensor packed = output(codes, {panels, fp8_panel_bytes(cols)}, ScalarType::Char);
  if (panels == 0) return packed;
  const auto* const from = reinterpret_cast<const uint8_t*>(element(codes, 0));
  parallel_rows(panels, kPanelCols * cols, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      fp8_pack(from, codes.stride(0), rows, cols, panel, data<uint8_t>(packed));
    }
  });
  return packed;
}

Tensor fp8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                const Block& weight_block, int64_t out_features, const Optional& input_scale,
                const std::optional<Block>& input_block, const Optional& bias) {
  constexpr auto kOp = "fp8_gemm";
  auto [weight, how, tensor] = check_fp8_gemm(kOp, x, packed, weight_scale, weight_block,
                                              out_features, input_scale, input_block, bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  Tensor y = output(x, {rows, out_features}, x.scalar_type());
  if (y.numel() == 0) return y;
  if (cols == 0) {
    fill_rows(y, bias);
    return y;
  }
  Tensor scale;
  if (tensor) {
    scale = fp8_tensor_scale(x);
    how.scale = data<float>(scale);
  }

  const Fp8Kernels& kernels = fp8_gemm_kernels();
  const DType dtype = dtype_of(kOp, x.scalar_type());
  const Fp8Plan plan = kernels.plan(weight, how, dtype);
  const RowsInput input = {dtype, element(x, 0), x.stride(0), cols, nullptr, nullptr};
  // One allocation: x's words, its scales.
  Tensor room =
      output(x, {rows * (plan.depth + (plan.scaled ? plan.groups : 0)) + 16}, ScalarType::Float);
  float* const words = data<float>(room);
  const PackedRows tiles = {words,        plan.scaled ? words + rows * plan.depth : nullptr,
                            rows,         plan.depth,
                            kernels.tile, plan.size,
                            plan.groups};
  const auto pack = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[fp8_room_bytes(cols)]);
    for (int64_t t = begin; t < end; ++t) {
      kernels.pack_tile(plan, how, input, tiles, t, scratch.get());
    }
  };
  if (rows <= 2 * kernels.tile) {
    pack(0, tiles.tiles());
  } else {
    parallel_rows(tiles.tiles(), cols * kernels.tile, pack);
  }

  const PanelOutput out = {dtype,         bias ? dtype_of(kOp, bias->scalar_type()) : dtype,
                           data<char>(y), bias ? element(*bias, 0) : nullptr,
                           out_features,  out_features};
  parallel_panels(tiles, packed.size(0), [&](int64_t panel, int64_t begin, int64_t end) {
    kernels.gemm(plan, weight, tiles, panel, begin, end, out);
  });
  return y;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("pack_fp8", TORCH_BOX(&qk::cpu::pack_fp8));
  m.impl("fp8_gemm", TORCH_BOX(&qk::cpu::fp8_gemm));
}
