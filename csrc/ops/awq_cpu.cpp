// awq_search on the CPU.
#include "cpu/awq.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

constexpr auto kOp = "awq_search";
constexpr int64_t kErrors = 128 * 1024;  // of a block of rows: they stay in the L2 cache
// The more rows, the better the errors of bf16 cancel out. A weight of fewer has little work, too.
constexpr int64_t kPairRows = 256, kManyRows = 512;

using Clips = std::vector<double>;

void check_arguments(const Tensor& w, const Tensor& g, const Tensor& scales, const Clips& clip,
                     int64_t group_size, int64_t q_min, int64_t q_max, ScalarType scale_dtype) {
  check(w.dim() == 2, kOp, "w must be 2-D [rows, K], got ", w.dim(), "-D");
  check_float(kOp, "w", w);
  check_rows(kOp, "w", w);
  const int64_t cols = w.size(1);
  check(g.dim() == 2 && g.size(0) == cols && g.size(1) == cols &&
            g.scalar_type() == ScalarType::Float,
        kOp, "g must be torch.float32 [", cols, ", ", cols, "], got ", name_of(g.scalar_type()),
        " ", text_of(g.sizes()));
  check_rows(kOp, "g", g);
  check(scales.dim() == 2 && scales.size(1) == cols && scales.scalar_type() == ScalarType::Float,
        kOp, "scales must be torch.float32 [candidates, ", cols, "], got ",
        name_of(scales.scalar_type()), " ", text_of(scales.sizes()));
  check_rows(kOp, "scales", scales);
  check(std::all_of(clip.begin(), clip.end(), [](double c) { return c > 0.0 && c <= 1.0; }), kOp,
        "clip ratios must lie in (0, 1]");
  check(group_size == -1 || group_size > 0, kOp,
        "group_size must be positive, or -1 for the whole row, got ", group_size);
  check_code_range(kOp, q_min, q_max);
  check_scale_dtype(kOp, scale_dtype);
}

const float* row_of(const Tensor& x, int64_t row) {
  return reinterpret_cast<const float*>(element(x, row * x.stride(0)));
}

// The first steps of a pivoted Cholesky factorization of g, each on the column whose diagonal is
// the largest left: V as AwqGram has it. A g that is no Gram matrix may end it early, and is split
// no less exactly.
void split(const Tensor& g, int factor_cols, std::vector<float>& factors,
           std::vector<float>& across, int64_t padded, std::vector<float>& diagonal) {
  const int64_t cols = g.size(0);
  for (int f = 0; f < factor_cols; ++f) {
    int64_t pivot = -1;
    float most = 0.0f;
    for (int64_t i = 0; i < cols; ++i) {
      if (diagonal[i] > most && std::isfinite(diagonal[i])) most = diagonal[pivot = i];
    }
    if (pivot < 0) return;
    float* const v = across.data() + f * padded;
    std::copy_n(row_of(g, pivot), cols, v);
    for (int k = 0; k < f; ++k) {
      const float *before = across.data() + k * padded, factor = before[pivot];
      for (int64_t i = 0; i < cols; ++i) v[i] -= factor * before[i];
    }
    const float inverse = 1.0f / std::sqrt(most);
    for (int64_t i = 0; i < cols; ++i) {
      v[i] *= inverse;
      factors[i * factor_cols + f] = v[i];
      diagonal[i] -= v[i] * v[i];
    }
  }
}

}  // namespace

Tensor awq_search(const Tensor& w, const Tensor& g, const Tensor& scales, const Clips& clip,
                  int64_t group_size, int64_t q_min, int64_t q_max, bool symmetric, double divisor,
                  ScalarType scale_dtype) {
  check_arguments(w, g, scales, clip, group_size, q_min, q_max, scale_dtype);
  const int64_t rows = w.size(0), cols = w.size(1);
  const int64_t candidates = scales.size(0), clips = static_cast<int64_t>(clip.size());
  Tensor losses = empty(w, {candidates, clips}, ScalarType::Float);
  std::fill_n(data<float>(losses), losses.numel(), 0.0f);
  if (losses.numel() == 0 || rows == 0 || cols == 0) return losses;

  const AwqKernels& kernels = awq_kernels();
  const int64_t tile = kernels.tile_cols, stripes = (cols + tile - 1) / tile;
  const int64_t padded = stripes * tile;
  const bool pairs = kernels.pairs && rows >= kPairRows;
  std::vector<float> diagonal(cols), factors, across;
  for (int64_t i = 0; i < cols; ++i) diagonal[i] = row_of(g, i)[i];
  const int factor_cols = !pairs ? 0 : rows < kManyRows ? 32 : 16;
  factors.resize(cols * factor_cols);
  across.resize(padded * factor_cols);
  split(g, factor_cols, factors, across, padded, diagonal);
  Tensor words = output(w, {awq_words_before(stripes, tile, pairs)}, ScalarType::Float);
  const AwqGram gram = {pairs,          cols,          padded,          factor_cols,
                        factors.data(), across.data(), diagonal.data(), data<void>(words)};
  torch::stable::parallel_for(0, stripes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) kernels.pack(gram, row_of(g, 0), g.stride(0), s * tile);
  });
  std::vector<float> inverse(candidates * cols);
  for (int64_t s = 0; s < candidates; ++s) {
    for (int64_t i = 0; i < cols; ++i) inverse[s * cols + i] = 1.0f / row_of(scales, s)[i];
  }

  const AwqQuantizer how = {group_size == -1 ? cols : group_size,
                            static_cast<int>(q_min),
                            static_cast<int>(q_max),
                            symmetric,
                            static_cast<float>(divisor),
                            dtype_of(kOp, scale_dtype)};
  const DType dtype = dtype_of(kOp, w.scalar_type());
  const int64_t panel = kernels.tile_rows, groups = (cols + how.group - 1) / how.group;
  const int64_t block = std::max<int64_t>(1, kErrors / padded / panel) * panel;
  const int64_t blocks = (rows + block - 1) / block;
  std::vector<double> parts(candidates * clips * blocks);
  torch::stable::parallel_for(
      0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
        std::vector<float> errors(block * padded / (pairs ? 2 : 1)), values(panel * padded),
            extremes(3 * panel * groups), sums(block * 16);
        std::vector<int8_t> zero(panel * groups);
        const AwqScratch scratch = {errors.data(), values.data(), extremes.data(), zero.data(),
                                    sums.data()};
        for (int64_t i = begin; i < end; ++i) {
          const int64_t s = i / blocks / clips, first = i % blocks * block;
          parts[i] = kernels.loss(
              gram, how,
              {dtype, element(w, first * w.stride(0)), w.stride(0), std::min(block, rows - first),
               row_of(scales, s), inverse.data() + s * cols,
               static_cast<float>(clip[i / blocks % clips])},
              scratch);
        }
      });
  for (int64_t i = 0; i < candidates * clips; ++i) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += parts[i * blocks + b];
    const float loss = static_cast<float>(sum);
    data<float>(losses)[i] = std::isfinite(loss) ? loss : std::numeric_limits<float>::infinity();
  }
  return losses;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("awq_search", TORCH_BOX(&qk::cpu::awq_search));
}
