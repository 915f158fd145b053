// How gptq_sweep cuts columns into stripes, and rows into turns, on the CPU.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/gptq.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

constexpr int64_t kTogether = 192;  // rows, in panels that take a stripe of the factor in turn
constexpr int64_t kPiece = 256;     // rows of a factor that a thread packs at once

// Matrix `index` of a batch, or the one that all share.
inline const float* matrix(const Tensor& x, int64_t index) {
  return reinterpret_cast<const float*>(element(x, x.dim() == 3 ? index * x.stride(0) : 0));
}

// Stripes of columns, the same for all rows, and where in a packed factor each has its part.
struct Plan {
  std::vector<GptqStripe> stripes;
  std::vector<int64_t> places;
  int64_t size = 0, columns;  // of the packed factor; of a stripe at most

  Plan(const GptqStripe& common, int64_t cols, int64_t step, int64_t tile) : columns(step) {
    const bool search = common.fit && (common.shrinks > 1 || common.signs);
    for (int64_t first = 0; first < cols; first += step) {
      GptqStripe s = common;
      s.first = first;
      s.width = std::min(step, cols - first);
      s.far = s.pairs ? first / 2 * 2 : 0;
      s.own = s.width + (s.pairs && search ? s.width / 2 : 0);
      s.group += first;
      stripes.push_back(s);
      places.push_back(size);
      size += (s.width + tile - 1) / tile * tile * (s.before() + s.own);
    }
  }
  // The stripe in a certain factor.
  GptqStripe stripe(size_t i, const float* packed, const float* diagonal) const {
    GptqStripe s = stripes[i];
    if (packed) s.factor = packed + places[i];
    s.diagonal = diagonal + s.first;
    return s;
  }
  // Packs `count` factors, the first of which is number `from`.
  void pack(const Tensor& factor, int64_t from, int64_t count, const float* diagonal,
            float* packed) const {
    const auto& kernels = gptq_kernels();
    std::vector<std::pair<size_t, int64_t>> pieces;
    for (size_t i = 0; i < stripes.size(); ++i) {
      const int64_t depth = stripes[i].first + stripes[i].width;
      for (int64_t row = 0; row < depth; row += kPiece) pieces.emplace_back(i, row);
    }
    const int64_t each = pieces.size(), cols = factor.size(-1);
    parallel_queue(count * each, [&](int64_t n) {
      const auto [i, row] = pieces[n % each];
      const int64_t which = from + n / each, depth = stripes[i].first + stripes[i].width;
      kernels.pack(stripe(i, nullptr, diagonal + which * cols), matrix(factor, which),
                   factor.stride(-2), row, std::min(row + kPiece, depth),
                   packed + n / each * size + places[i]);
    });
  }
};

// Panels [first, first + count) in turn, all of one matrix: the less is left, the fewer, so that no
// thread ends long before the others; but each turn reads the whole factor once.
struct Turn {
  int64_t first, count;
};
inline std::vector<Turn> turns_of(int64_t begin, int64_t end, int64_t each, int64_t most) {
  const int64_t threads = workers(end - begin);
  const int64_t least = std::clamp<int64_t>((end - begin) / (4 * threads), 1, (most + 1) / 2);
  std::vector<Turn> turns;
  for (int64_t p = begin; p < end; p += turns.back().count) {
    const int64_t fair = (end - p) / (2 * threads), left = each - p % each;
    turns.push_back({p, std::min({left, end - p, std::clamp(fair, least, most)})});
  }
  return turns;
}

}  // namespace qk::cpu
