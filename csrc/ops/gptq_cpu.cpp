// gptq_sweep on the CPU.
#include "cpu/gptq.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

constexpr auto kOp = "gptq_sweep";
constexpr int64_t kStripe = 128;

using Optional = std::optional<Tensor>;

void check_arguments(const Tensor& w, const Tensor& u, const Optional& scale,
                     const Optional& zero_point, int64_t group_size, int64_t q_min, int64_t q_max,
                     ScalarType scale_dtype, const Optional& g_idx) {
  check(w.dim() == 2 && w.scalar_type() == ScalarType::Float, kOp,
        "w must be torch.float32 [rows, K], got ", name_of(w.scalar_type()), " ",
        text_of(w.sizes()));
  const int64_t cols = w.size(1);
  check(u.dim() == 2 && u.size(0) == cols && u.size(1) == cols &&
            u.scalar_type() == ScalarType::Float,
        kOp, "u must be torch.float32 [", cols, ", ", cols, "], got ", name_of(u.scalar_type()),
        " ", text_of(u.sizes()));
  check_rows(kOp, "w", w);
  check_rows(kOp, "u", u);
  check(group_size == -1 || group_size > 0, kOp,
        "group_size must be positive, or -1 for the whole row, got ", group_size);
  check_code_range(kOp, q_min, q_max);
  check_scale_dtype(kOp, scale_dtype);
  if (scale) {
    const int64_t block[] = {1, group_size};
    check_scale(kOp, w, *scale, zero_point, {block, 2});
  } else {
    check(!zero_point && !g_idx, kOp,
          "zero_point and g_idx go with a given scale; without one they are computed");
  }
  if (g_idx) {
    check(g_idx->dim() == 1 && g_idx->size(0) == cols && g_idx->scalar_type() == ScalarType::Int,
          kOp, "g_idx must be torch.int32 [", cols, "], got ", name_of(g_idx->scalar_type()), " ",
          text_of(g_idx->sizes()));
    check(g_idx->is_contiguous(), kOp, "g_idx must be contiguous");
  }
}

std::vector<int32_t> groups_of(int64_t cols, int64_t size, int64_t groups, const Optional& g_idx) {
  std::vector<int32_t> group(cols);
  for (int64_t c = 0; c < cols; ++c) {
    group[c] = g_idx ? data<int32_t>(*g_idx)[c] : static_cast<int32_t>(c / size);
    check(group[c] >= 0 && group[c] < groups, kOp, "g_idx must lie in [0, ", groups, ")");
  }
  return group;
}

// Rows [first, first + rows) of w as a panel, zero beyond them; whether they are all finite.
bool load_panel(const Tensor& w, int64_t first, int64_t rows, int64_t width, float* panel) {
  constexpr int64_t kColumns = 16;  // a cache line of each row at a time
  const int64_t cols = w.size(1), stride = w.stride(0);
  const float* source = reinterpret_cast<const float*>(element(w, first * stride));
  float residue = 0.0f;  // x - x is zero unless x is infinite or NaN
  for (int64_t c = 0; c < cols; c += kColumns) {
    const int64_t end = std::min(cols, c + kColumns);
    for (int64_t r = 0; r < width; ++r) {
      for (int64_t i = c; i < end; ++i) {
        const float x = r < rows ? source[r * stride + i] : 0.0f;
        residue += x - x;
        panel[i * width + r] = x;
      }
    }
  }
  return residue == 0.0f;
}

// f(first panel, end) for all panels, over threads.
template <typename Body>
void parallel(int64_t n, const Body& body) {
  torch::stable::parallel_for(0, n, 1, body);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gptq_sweep(
    const Tensor& w, const Tensor& u, const Optional& scale, const Optional& zero_point,
    int64_t group_size, int64_t q_min, int64_t q_max, bool symmetric, double divisor,
    ScalarType scale_dtype, const Optional& g_idx) {
  check_arguments(w, u, scale, zero_point, group_size, q_min, q_max, scale_dtype, g_idx);
  const int64_t rows = w.size(0), cols = w.size(1);
  const int64_t size = group_size == -1 ? std::max<int64_t>(cols, 1) : group_size;
  const int64_t groups = (cols + size - 1) / size;
  const bool with_zero = scale ? zero_point.has_value() : !symmetric;
  Tensor codes = output(w, {rows, cols}, ScalarType::Char);
  Tensor out_scale = empty(w, {rows, groups}, ScalarType::Float);
  Tensor out_zero =
      with_zero ? empty(w, {rows, groups}, ScalarType::Char) : empty(w, {0}, ScalarType::Char);
  Tensor loss = empty(w, {rows}, ScalarType::Float);
  if (rows == 0 || cols == 0) {
    std::fill_n(data<float>(loss), rows, 0.0f);
    return {codes, out_scale, out_zero, loss};
  }
  const std::vector<int32_t> group = groups_of(cols, size, groups, g_idx);
  std::vector<float> inverse(cols);
  for (int64_t c = 0; c < cols; ++c) {
    const float d = *reinterpret_cast<const float*>(element(u, c * u.stride(0) + c));
    check(d > 0.0f && std::isfinite(d), kOp, "u's diagonal must be positive and finite, got ", d,
          " in column ", c);
    inverse[c] = 1.0f / d;
  }

  const GptqKernels& kernels = gptq_kernels();
  const int64_t width = kernels.panel_rows, panels = (rows + width - 1) / width;
  const int64_t padded = cols + kernels.panel_cols;  // a tile may reach beyond the last column
  Tensor values = output(w, {panels, padded, width}, ScalarType::Float);
  std::vector<float> scales(panels * groups * width, 1.0f), zeros(scales.size(), 0.0f);
  std::vector<float> losses(panels * width, 0.0f);
  std::atomic<bool> finite = true;
  parallel(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* panel = data<float>(values) + p * padded * width;
      const int64_t n = std::min(width, rows - p * width);
      if (!load_panel(w, p * width, n, width, panel)) finite = false;
      std::fill(panel + cols * width, panel + padded * width, 0.0f);
    }
  });
  check(finite, kOp, "w holds NaN or infinities: is the checkpoint damaged?");

  const auto place = [&](int64_t r, int64_t g) {
    return (r / width * groups + g) * width + r % width;
  };
  // Scales that do not wait for updates: given ones, and those of whole rows.
  const bool fit = !scale && groups > 1;
  if (!fit) {
    const auto start = [&](const Tensor& first, const Tensor* first_zero) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t g = 0; g < groups; ++g) {
          scales[place(r, g)] = data<float>(first)[r * groups + g];
          if (first_zero) zeros[place(r, g)] = data<int8_t>(*first_zero)[r * groups + g];
        }
      }
    };
    if (scale) {
      start(*scale, zero_point ? &*zero_point : nullptr);
    } else if (symmetric) {
      start(symmetric_scale(absmax(w, {1, -1}), divisor, scale_dtype), nullptr);
    } else {
      const auto [low, high] = minmax(w, {1, -1});
      const auto [found, zero] = asymmetric_scale(low, high, q_min, q_max, scale_dtype);
      start(found, &zero);
    }
  }

  // A stripe whose scale is to be fitted is one group: it needs all its weights updated at once.
  const int64_t step = fit ? size : kStripe, tile = kernels.panel_cols;
  Tensor packed = output(w, {(step + tile - 1) / tile * tile, cols}, ScalarType::Float);
  for (int64_t first = 0; first < cols; first += step) {
    const int64_t columns = std::min(step, cols - first), depth = first + columns;
    parallel((depth + 63) / 64, [&](int64_t begin, int64_t end) {
      kernels.pack(reinterpret_cast<const float*>(element(u, 0)), u.stride(0), first, columns,
                   begin * 64, std::min(depth, end * 64), depth, data<float>(packed));
    });
    const GptqStripe stripe = {
        first,
        columns,
        data<float>(packed),
        inverse.data() + first,
        group.data() + first,
        fit,
        symmetric,
        static_cast<float>(divisor),
        dtype_of(kOp, scale_dtype),
        static_cast<int>(q_min),
        static_cast<int>(q_max),
    };
    parallel(panels, [&](int64_t begin, int64_t end) {
      std::vector<int8_t> scratch(columns * width);
      for (int64_t p = begin; p < end; ++p) {
        const GptqPanel panel = {
            data<float>(values) + p * padded * width, scales.data() + p * groups * width,
            zeros.data() + p * groups * width,        losses.data() + p * width,
            data<int8_t>(codes) + p * width * cols,   cols,
            std::min(width, rows - p * width),
        };
        kernels.sweep(stripe, panel, scratch.data());
      }
    });
  }

  for (int64_t r = 0; r < rows; ++r) {
    data<float>(loss)[r] = losses[r];
    check(std::isfinite(losses[r]), kOp,
          "the loss is not finite: u holds NaN or infinities, or a scale does");
    for (int64_t g = 0; g < groups; ++g) {
      data<float>(out_scale)[r * groups + g] = scales[place(r, g)];
      if (with_zero) {
        data<int8_t>(out_zero)[r * groups + g] = static_cast<int8_t>(zeros[place(r, g)]);
      }
    }
  }
  return {codes, out_scale, out_zero, loss};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("gptq_sweep", TORCH_BOX(&qk::cpu::gptq_sweep));
}
