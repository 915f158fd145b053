// gptq_sweep on the CPU.
#include "cpu/gptq.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "ops/cpu_ops.h"
#include "ops/gptq.h"
#include "ops/gptq_plan.h"

namespace qk::cpu {
namespace {

constexpr auto kOp = "gptq_sweep";
constexpr int64_t kStripe = 128;
// Up to so many columns, nothing but fp32. Beyond, what earlier stripes leave to be made up for is
// summed from bf16 numbers: an error of 2^-9 in what is itself an error.
constexpr int64_t kExact = 512;
constexpr int64_t kPacked = 1 << 26;  // numbers of a batch's packed factors at a time

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
    bool signs, int64_t float_bits) {
  const SweepShape shape =
      check_sweep(kOp, {w, factor, scale, zero_point, g_idx, group_size, q_min, q_max, scale_dtype,
                        search_range, search_steps, symmetric, signs, float_bits});
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

  const GptqKernels& kernels = gptq_kernels();
  const int64_t width = kernels.panel_rows, tile = kernels.panel_cols;
  // A scale of a group waits for the group's weights, all of which must be up to date then: such a
  // stripe is one group. A given scale, or the row's, does not.
  const bool fit = !scale && group_size != -1;
  const GptqStripe common = {.first = 0,
                             .width = cols,
                             .pairs = kernels.pairs && cols > kExact,
                             .far = 0,
                             .factor = nullptr,
                             .own = cols,
                             .diagonal = nullptr,
                             .group = group.data(),
                             .fit = fit,
                             .symmetric = symmetric,
                             .signs = signs,
                             .shrink = shrink.data(),
                             .shrinks = static_cast<int>(shrink.size()),
                             .divisor = static_cast<float>(signs ? -q_min : divisor),
                             .scale_dtype = dtype_of(kOp, scale_dtype),
                             .q_min = static_cast<int>(q_min),
                             .q_max = static_cast<int>(q_max),
                             .float_bits = static_cast<int>(float_bits)};
  const Plan plan(common, cols, std::min(fit ? shape.size : kStripe, cols), tile);

  // Panels of rows, those of each matrix of the batch after the ones before.
  const int64_t each = (rows + width - 1) / width, panels = shape.batch * each;
  const int64_t padded = cols + tile;  // a tile may reach beyond the last column
  const int64_t stripe_size = plan.columns * width;
  const int64_t panel_size = (padded + 2 * groups + 1) * width + stripe_size;
  const int64_t most = std::min(kTogether / width, each), panels_size = most * panel_size;
  const int64_t scratch_size = 2 * (stripe_size + tile * width);
  const int64_t room = panels_size + scratch_size + (stripe_size + 63) / 64 * 16;
  Tensor memory = output(w, {workers(panels), room}, ScalarType::Float);
  const auto panel_of = [&](int64_t p, float* at) {
    const int64_t row = p / each * rows + p % each * width;
    float* const scales = at + padded * width;
    float* const losses = scales + 2 * groups * width;
    return GptqPanel{at,
                     scales,
                     scales + groups * width,
                     losses,
                     data<int8_t>(codes) + row * cols,
                     cols,
                     std::min(width, rows - p % each * width)};
  };

  std::atomic<bool> finite = true, sound = true;
  const auto begin_panel = [&](int64_t p, const GptqPanel& panel) {
    const int64_t first = p % each * width, row = p / each * rows + first;
    if (!kernels.load(matrix(w, p / each) + first * w.stride(-2), w.stride(-2), cols, panel.rows,
                      panel.values)) {
      finite = false;
    }
    std::fill_n(panel.values + cols * width, tile * width, 0.0f);
    std::fill_n(panel.scale, groups * width, 1.0f);
    std::fill_n(panel.zero, (groups + 1) * width, 0.0f);  // and the loss
    for (int64_t i = 0; scale && i < panel.rows * groups; ++i) {
      const int64_t place = i % groups * width + i / groups;
      panel.scale[place] = data<float>(*scale)[row * groups + i];
      if (zero_point) panel.zero[place] = data<int8_t>(*zero_point)[row * groups + i];
    }
    if (!scale && !fit) {
      GptqStripe whole = common;
      whole.diagonal = diagonal.data() + (shape.factors == 1 ? 0 : p / each * cols);
      kernels.fit(whole, panel);
    }
  };
  const auto end_panel = [&](int64_t p, const GptqPanel& panel) {
    const int64_t row = p / each * rows + p % each * width;
    for (int64_t r = 0; r < panel.rows; ++r) {
      data<float>(loss)[row + r] = panel.loss[r];
      if (!std::isfinite(panel.loss[r])) sound = false;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t to = (row + r) * groups + g, from = g * width + r;
        data<float>(out_scale)[to] = panel.scale[from];
        if (with_zero) data<int8_t>(out_zero)[to] = static_cast<int8_t>(panel.zero[from]);
      }
    }
  };

  const int64_t matrices =
      shape.factors == 1 ? shape.batch : std::clamp<int64_t>(kPacked / plan.size, 1, shape.batch);
  const int64_t at_once = std::min(shape.factors, matrices);
  Tensor packed = output(w, {at_once, plan.size}, ScalarType::Float);
  for (int64_t from = 0; from < shape.batch; from += matrices) {
    const int64_t to = std::min(from + matrices, shape.batch);
    plan.pack(factor, from, std::min(at_once, to - from), diagonal.data(), data<float>(packed));
    const std::vector<Turn> turns = turns_of(from * each, to * each, each, most);
    parallel_workers(turns.size(), [&](int64_t worker, int64_t t) {
      const auto [first, count] = turns[t];
      float* const mine = data<float>(memory) + worker * room;
      float* const scratch = mine + panels_size;
      int8_t* const rounded = reinterpret_cast<int8_t*>(scratch + scratch_size);
      const int64_t which = shape.factors == 1 ? 0 : first / each;
      const auto for_all = [&](auto body) {
        for (int64_t i = 0; i < count; ++i)
          body(first + i, panel_of(first + i, mine + i * panel_size));
      };
      for_all(begin_panel);
      for (size_t i = 0; i < plan.stripes.size(); ++i) {
        const GptqStripe stripe = plan.stripe(
            i, data<float>(packed) + (which - (shape.factors == 1 ? 0 : from)) * plan.size,
            diagonal.data() + which * cols);
        const auto weights = [&](const GptqPanel& panel) { return panel.loss + width; };
        for_all([&](int64_t, const GptqPanel& panel) {
          std::copy_n(panel.values + stripe.first * width, stripe.width * width, weights(panel));
        });
        for (int64_t begin = 0; begin < stripe.before(); begin += kernels.depth) {
          const int64_t end = std::min(begin + kernels.depth, stripe.before());
          for_all(
              [&](int64_t, const GptqPanel& panel) { kernels.make_up(stripe, panel, begin, end); });
        }
        for_all([&](int64_t, const GptqPanel& panel) {
          kernels.sweep(stripe, panel, weights(panel), rounded, scratch);
        });
      }
      for_all(end_panel);
    });
  }
  check(finite, kOp, "w holds NaN or infinities: is the checkpoint damaged?");
  check(sound, kOp, "the loss is not finite: factor holds NaN or infinities, or a scale does");
  return {codes, out_scale, out_zero, loss};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("gptq_sweep", TORCH_BOX(&qk::cpu::gptq_sweep));
}
