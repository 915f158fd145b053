// gptq_sweep on the CPU.
#include "cpu/gptq.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "ops/cpu_ops.h"
#include "ops/gptq.h"

namespace qk::cpu {
namespace {

constexpr auto kOp = "gptq_sweep";
constexpr int64_t kStripe = 128;
// Up to so many columns, nothing but fp32. Beyond, what earlier stripes leave to be made up for is
// summed from bf16 numbers: an error of 2^-9 in what is itself an error.
constexpr int64_t kExact = 512;

using Optional = std::optional<Tensor>;

std::vector<int32_t> groups_of(const SweepShape& shape, const Optional& g_idx) {
  std::vector<int32_t> group(shape.cols);
  for (int64_t c = 0; c < shape.cols; ++c) {
    group[c] = g_idx ? data<int32_t>(*g_idx)[c] : static_cast<int32_t>(c / shape.size);
    check(group[c] >= 0 && group[c] < shape.groups, kOp, "g_idx must lie in [0, ", shape.groups,
          ")");
  }
  return group;
}

// What the ranges are shrunk by in the search for a scale: 1 first, which alone is no search.
std::vector<float> shrinks_of(double range, int64_t steps) {
  std::vector<float> shrink = {1.0f};
  for (int64_t i = 1; i <= steps; ++i) {
    shrink.push_back(static_cast<float>(1.0 - range * static_cast<double>(i) / steps));
  }
  return shrink;
}

// Matrix `index` of a batch, or the one that all share.
const float* matrix(const Tensor& x, int64_t index) {
  return reinterpret_cast<const float*>(element(x, x.dim() == 3 ? index * x.stride(0) : 0));
}

std::vector<float> diagonals_of(const Tensor& factor, const SweepShape& shape) {
  std::vector<float> diagonal(shape.factors * shape.cols);
  for (int64_t i = 0; i < shape.factors * shape.cols; ++i) {
    const int64_t c = i % shape.cols;
    const float d = matrix(factor, i / shape.cols)[c * (factor.stride(-2) + 1)];
    check(d > 0.0f && std::isfinite(d), kOp, "factor's diagonal must be positive and finite, got ",
          d, " in column ", c);
    diagonal[i] = d;
  }
  return diagonal;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gptq_sweep(
    const Tensor& w, const Tensor& factor, const Optional& scale, const Optional& zero_point,
    int64_t group_size, int64_t q_min, int64_t q_max, bool symmetric, double divisor,
    ScalarType scale_dtype, const Optional& g_idx, double search_range, int64_t search_steps,
    bool signs) {
  const SweepShape shape =
      check_sweep(kOp, {w, factor, scale, zero_point, g_idx, group_size, q_min, q_max, scale_dtype,
                        search_range, search_steps, symmetric, signs});
  const int64_t rows = shape.rows, cols = shape.cols, groups = shape.groups;
  const bool with_zero = scale ? zero_point.has_value() : !symmetric;
  Tensor codes = output(w, shape.with(cols), ScalarType::Char);
  Tensor out_scale = output(w, shape.with(groups), ScalarType::Float);
  Tensor out_zero =
      with_zero ? output(w, shape.with(groups), ScalarType::Char) : empty(w, {0}, ScalarType::Char);
  Tensor loss = output(w, shape.with(-1), ScalarType::Float);
  if (shape.batch == 0 || rows == 0 || cols == 0) {
    std::fill_n(data<float>(loss), shape.batch * rows, 0.0f);
    return {codes, out_scale, out_zero, loss};
  }
  const std::vector<int32_t> group = groups_of(shape, g_idx);
  const std::vector<float> shrink = shrinks_of(search_range, search_steps);
  const std::vector<float> diagonal = diagonals_of(factor, shape);

  // Panels of rows, those of each matrix of the batch after the ones before.
  const GptqKernels& kernels = gptq_kernels();
  const int64_t width = kernels.panel_rows, each = (rows + width - 1) / width;
  const int64_t panels = shape.batch * each, tile = kernels.panel_cols;
  const int64_t padded = cols + tile;  // a tile may reach beyond the last column
  Tensor values = output(w, {panels, padded, width}, ScalarType::Float);
  std::vector<float> scales(panels * groups * width, 1.0f), zeros(scales.size(), 0.0f);
  std::vector<float> losses(panels * width, 0.0f);
  const auto panel_of = [&](int64_t p) {
    const int64_t row = p / each * rows + p % each * width;
    return GptqPanel{data<float>(values) + p * padded * width, scales.data() + p * groups * width,
                     zeros.data() + p * groups * width,        losses.data() + p * width,
                     data<int8_t>(codes) + row * cols,         cols,
                     std::min(width, rows - p % each * width)};
  };
  const auto factor_of = [&](int64_t p) { return shape.factors == 1 ? 0 : p / each; };
  // A scale of a group waits for the group's weights; a given one, or the row's, does not.
  const bool fit = !scale && group_size != -1;
  const bool pairs = kernels.pairs && cols > kExact;
  const auto far_of = [&](int64_t first) { return pairs ? first / 2 * 2 : 0; };
  const auto stripe_of = [&](int64_t first, int64_t columns, const float* packed, int64_t which) {
    return GptqStripe{first,
                      columns,
                      pairs,
                      far_of(first),
                      packed,
                      diagonal.data() + which * cols + first,
                      group.data() + first,
                      fit,
                      symmetric,
                      signs,
                      shrink.data(),
                      static_cast<int>(shrink.size()),
                      static_cast<float>(signs ? -q_min : divisor),
                      dtype_of(kOp, scale_dtype),
                      static_cast<int>(q_min),
                      static_cast<int>(q_max)};
  };

  std::atomic<bool> finite = true;
  parallel_queue(panels, [&](int64_t p) {
    const GptqPanel panel = panel_of(p);
    const int64_t first = p % each * width;
    if (!kernels.load(matrix(w, p / each) + first * w.stride(-2), w.stride(-2), cols, panel.rows,
                      panel.values)) {
      finite = false;
    }
    std::fill(panel.values + cols * width, panel.values + padded * width, 0.0f);
    for (int64_t i = 0; scale && i < panel.rows * groups; ++i) {
      const int64_t r = i / groups, g = i % groups, from = (p / each * rows + first) * groups + i;
      panel.scale[g * width + r] = data<float>(*scale)[from];
      if (zero_point) panel.zero[g * width + r] = data<int8_t>(*zero_point)[from];
    }
    if (!scale && !fit) kernels.fit(stripe_of(0, cols, nullptr, factor_of(p)), panel);
  });
  check(finite, kOp, "w holds NaN or infinities: is the checkpoint damaged?");

  // A stripe whose scale is to be fitted is one group: it needs all its weights updated at once.
  const int64_t step = fit ? std::min(shape.size, cols) : kStripe,
                stripe_cols = (step + tile - 1) / tile * tile;
  Tensor packed = output(w, {shape.factors, stripe_cols, cols}, ScalarType::Float);
  for (int64_t first = 0; first < cols; first += step) {
    const int64_t columns = std::min(step, cols - first), depth = first + columns;
    const int64_t pieces = (depth + 63) / 64;
    parallel_queue(shape.factors * pieces, [&](int64_t i) {
      const int64_t which = i / pieces, begin = i % pieces * 64;
      const GptqPack pack = {matrix(factor, which),
                             factor.stride(-2),
                             diagonal.data() + which * cols + first,
                             first,
                             columns,
                             far_of(first)};
      kernels.pack(pack, begin, std::min(depth, begin + 64),
                   data<float>(packed) + which * stripe_cols * cols);
    });
    parallel_queue(panels, [&](int64_t p) {
      const auto rounded = std::make_unique_for_overwrite<int8_t[]>(columns * width);
      const auto scratch =
          std::make_unique_for_overwrite<float[]>((3 * columns + 2 * tile) * width);
      const float* const part = data<float>(packed) + factor_of(p) * stripe_cols * cols;
      kernels.sweep(stripe_of(first, columns, part, factor_of(p)), panel_of(p), rounded.get(),
                    scratch.get());
    });
  }

  for (int64_t p = 0; p < panels; ++p) {
    const GptqPanel panel = panel_of(p);
    for (int64_t r = 0; r < panel.rows; ++r) {
      const int64_t row = p / each * rows + p % each * width + r;
      data<float>(loss)[row] = panel.loss[r];
      check(std::isfinite(panel.loss[r]), kOp,
            "the loss is not finite: factor holds NaN or infinities, or a scale does");
      for (int64_t g = 0; g < groups; ++g) {
        data<float>(out_scale)[row * groups + g] = panel.scale[g * width + r];
        if (with_zero) {
          data<int8_t>(out_zero)[row * groups + g] = static_cast<int8_t>(panel.zero[g * width + r]);
        }
      }
    }
  }
  return {codes, out_scale, out_zero, loss};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("gptq_sweep", TORCH_BOX(&qk::cpu::gptq_sweep));
}
