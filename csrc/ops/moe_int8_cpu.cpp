// moe_w8a8_gemm and moe_w4a8_gemm on the CPU: all rows become int8 codes, each expert's are
// multiplied by its weight.
#include "cpu/w4a8.h"
#include "ops/moe.h"
#include "ops/w8a8.h"

namespace qk::cpu {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kQuantizeElements = 8192;  // a thread takes at a time
constexpr int64_t kPieceRows = 192;          // of an expert that a thread takes at a time

std::vector<MoePiece> rows_of(const Moe& moe) {
  return moe_pieces(moe, kQuantizeElements / (moe.in_features + 1) + 1, 1,
                    [](const Expert& e) { return e.rows(); });
}
std::vector<MoePiece> panels_of(const Moe& moe, int64_t panels) {
  return moe_pieces(moe, kPieceRows, panels, [](const Expert& e) { return e.rows(); });
}

const float* numbers_of(const Tensor& stack, int64_t e) {
  return reinterpret_cast<const float*>(part_data(stack, e));
}

}  // namespace

Tensor moe_w8a8_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                     const Tensor& weight_scale, int64_t out_features, const Optional& input_scale,
                     const Optional& input_zero_point, bool symmetric, const Optional& bias,
                     const Optional& row_scale) {
  const Moe moe = check_moe("moe_w8a8_gemm", x, offsets, out_features, row_scale);
  check_stack(moe, "packed", packed, offsets);
  check_stack(moe, "weight_scale", weight_scale, offsets);
  check_stack(moe, "input_scale", input_scale, offsets);
  check_stack(moe, "input_zero_point", input_zero_point, offsets);
  check_stack(moe, "bias", bias, offsets);
  if (packed.size(0) == 0) return moe.y;
  const auto number = [](const Optional& stack) {
    Tensor copy = stack ? *stack : Tensor();
    return stack ? Optional(torch::stable::narrow(copy, 0, 0, 1)) : std::nullopt;
  };
  w8a8_gemm(no_rows(x), part(packed, 0), part(weight_scale, 0), out_features, number(input_scale),
            number(input_zero_point), symmetric, part(bias, 0));
  if (moe.y.numel() == 0) return moe.y;

  const W8A8Kernels& kernels = w8a8_kernels();
  const int64_t cols = moe.in_features, row_bytes = w8a8_row_bytes(cols);
  const int64_t panel_bytes = w8a8_panel_bytes(cols), sums_size = kPieceRows * kPanel;
  const Tensor codes = output(x, {moe.rows, row_bytes}, ScalarType::Char),
               scale = output(x, {moe.rows}, ScalarType::Float),
               zero = output(x, {moe.rows}, ScalarType::Int),
               sums = output(x, {moe.threads(), sums_size}, ScalarType::Int);
  const Int8Rows rows = {data<uint8_t>(codes), row_bytes, data<float>(scale), data<int32_t>(zero)};
  Int8Task task = {};
  task.rows = rows;
  task.cols = cols;
  task.dtype = moe.dtype;
  task.stride = out_features;
  task.one_scale = weight_scale.size(1) == 1;
  const auto panel_of = [&](const MoePiece& p) {
    return reinterpret_cast<const int8_t*>(part_data(packed, moe.experts[p.expert].index)) +
           p.panel * panel_bytes;
  };
  moe_product(
      moe, kPanel, rows_of(moe),
      [&](const MoePiece& p, int64_t) {
        const Expert& e = moe.experts[p.expert];
        const Int8Input input = {moe.dtype,
                                 moe.x,
                                 moe.x_stride,
                                 cols,
                                 symmetric,
                                 input_scale ? numbers_of(*input_scale, e.index) : nullptr,
                                 input_zero_point ? reinterpret_cast<const int8_t*>(
                                                        part_data(*input_zero_point, e.index))
                                                  : nullptr,
                                 nullptr,
                                 0};
        kernels.quantize(input, e.begin + p.begin, e.begin + p.end, rows, nullptr);
      },
      panels_of(moe, (out_features + kPanel - 1) / kPanel),
      [&](const MoePiece& p, const MoePiece* next, int64_t thread) {
        const Expert& e = moe.experts[p.expert];
        const int64_t column = p.panel * kPanel;
        Int8Task own = task;
        own.begin = e.begin + p.begin;
        own.end = e.begin + p.end;
        own.panel = panel_of(p);
        own.next = next && (next->expert != p.expert || next->panel != p.panel) ? panel_of(*next)
                                                                                : nullptr;
        own.sums = data<int32_t>(sums) + thread * sums_size;
        own.columns = std::min(kPanel, out_features - column);
        own.out = data<char>(moe.y) + column * moe.element_bytes();
        own.scale = numbers_of(weight_scale, e.index) + (task.one_scale ? 0 : column);
        if (bias) {
          own.bias =
              part_data(*bias, e.index) + column * static_cast<int64_t>(bias->element_size());
          own.bias_dtype = dtype_of(moe.op, bias->scalar_type());
        }
        kernels.multiply(own);
        return std::pair(own.begin, own.end);
      });
  return moe.y;
}

Tensor moe_w4a8_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                     const Tensor& weight_scale, int64_t out_features, int64_t group_size,
                     const Optional& weight_zero_point, const Optional& bias,
                     const Optional& row_scale) {
  const Moe moe = check_moe("moe_w4a8_gemm", x, offsets, out_features, row_scale);
  check_stack(moe, "packed", packed, offsets);
  check_stack(moe, "weight_scale", weight_scale, offsets);
  check_stack(moe, "weight_zero_point", weight_zero_point, offsets);
  check_stack(moe, "bias", bias, offsets);
  if (packed.size(0) == 0) return moe.y;
  w4a8_gemm(no_rows(x), part(packed, 0), part(weight_scale, 0), out_features, group_size,
            part(weight_zero_point, 0), part(bias, 0));
  if (moe.y.numel() == 0) return moe.y;

  const W4A8Kernels& kernels = w4a8_kernels();
  const int64_t cols = moe.in_features, row_bytes = w4a8_row_bytes(cols);
  const int64_t panels = w4a8_panels(out_features), sums_size = kPieceRows * kW4Panel;
  const int64_t group = group_size == -1 ? cols : group_size, groups = cols ? cols / group : 0;
  const int64_t count = static_cast<int64_t>(moe.experts.size());
  const Tensor codes = output(x, {moe.rows, row_bytes}, ScalarType::Char),
               scale = output(x, {moe.rows}, ScalarType::Float),
               minus = output(x, {moe.rows, groups}, ScalarType::Int),
               sums = output(x, {moe.threads(), sums_size}, ScalarType::Float);
  const W4A8Tokens tokens = {data<int8_t>(codes), row_bytes, data<float>(scale),
                             data<int32_t>(minus)};

  // Scales and zero points by panels: as they are, or those of the experts that have rows, made.
  const auto by_panels = [&](const Tensor& stack) {
    Tensor made =
        output(x, {stack.dim() == 4 ? 0 : count, panels, groups, kW4Panel}, stack.scalar_type());
    if (stack.dim() == 3) {
      const int64_t bytes = static_cast<int64_t>(stack.element_size());
      parallel_queue(count * panels, [&](int64_t i) {
        const int64_t e = i / panels;
        w4a8_pack_scales(part_data(stack, moe.experts[e].index), bytes, out_features, groups,
                         i % panels, data<char>(made) + e * panels * groups * kW4Panel * bytes);
      });
    }
    return made;
  };
  const bool made = weight_scale.dim() == 3;
  const Tensor scales = by_panels(weight_scale);
  const Tensor zeros = weight_zero_point ? by_panels(*weight_zero_point) : scales;
  std::vector<W4A8Weight> weights(count);
  for (int64_t e = 0; e < count; ++e) {
    const int64_t index = moe.experts[e].index;
    W4A8Weight& weight = weights[e];
    weight.words = reinterpret_cast<const uint32_t*>(part_data(packed, index));
    weight.scale_dtype = dtype_of(moe.op, weight_scale.scalar_type());
    weight.scale = made ? part_data(scales, e) : part_data(weight_scale, index);
    if (weight_zero_point) {
      weight.zero_point = reinterpret_cast<const int8_t*>(
          made ? part_data(zeros, e) : part_data(*weight_zero_point, index));
    }
    weight.rows = out_features;
    weight.cols = cols;
    weight.group = group;
    if (bias) {
      weight.bias = part_data(*bias, index);
      weight.bias_dtype = dtype_of(moe.op, bias->scalar_type());
    }
  }
  W4A8Task task = {};
  task.tokens = tokens;
  task.dtype = moe.dtype;
  task.out = data<void>(moe.y);
  task.stride = out_features;
  moe_product(
      moe, kW4Panel, rows_of(moe),
      [&](const MoePiece& p, int64_t) {
        const Expert& e = moe.experts[p.expert];
        kernels.quantize(moe.dtype, moe.x, moe.x_stride, cols, group, e.begin + p.begin,
                         e.begin + p.end, tokens);
      },
      panels_of(moe, panels),
      [&](const MoePiece& p, const MoePiece* next, int64_t thread) {
        const Expert& e = moe.experts[p.expert];
        W4A8Task own = task;
        own.begin = e.begin + p.begin;
        own.end = e.begin + p.end;
        own.panel = p.panel;
        own.next = next && next->expert == p.expert && next->panel != p.panel ? next->panel : -1;
        own.sums = data<float>(sums) + thread * sums_size;
        kernels.multiply(weights[p.expert], own);
        return std::pair(own.begin, own.end);
      });
  return moe.y;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("moe_w8a8_gemm", TORCH_BOX(&qk::cpu::moe_w8a8_gemm));
  m.impl("moe_w4a8_gemm", TORCH_BOX(&qk::cpu::moe_w4a8_gemm));
}
