// The arguments that the GEMMs over experts share.
#include "ops/moe.h"

namespace qk::cpu {
namespace {

constexpr int64_t kThreadElements = 64 << 10;  // of weights that are worth waking a thread for

template <typename Int>
std::vector<int64_t> numbers(const Tensor& tensor) {
  const Int* const first = reinterpret_cast<const Int*>(element(tensor, 0));
  return {first, first + tensor.numel()};
}

}  // namespace

int64_t Moe::threads() const {
  const int64_t worth =
      static_cast<int64_t>(experts.size()) * out_features * in_features / kThreadElements + 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), worth);
}

Moe check_moe(const char* op, const Tensor& x, const Tensor& offsets, int64_t out_features,
              const std::optional<Tensor>& row_scale) {
  check(x.dim() == 2, op, "x must be 2-D [M, K], got ", x.dim(), "-D");
  check_float(op, "x", x);
  check_rows(op, "x", x);
  const int64_t rows = x.size(0);
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  check(offsets.dim() == 1 && offsets.size(0) >= 1 &&
            (wide || offsets.scalar_type() == ScalarType::Int),
        op, "offsets must be torch.int64 or torch.int32 [experts + 1], got ",
        name_of(offsets.scalar_type()), " ", text_of(offsets.sizes()));
  check(offsets.is_contiguous(), op, "offsets must be contiguous, got strides ",
        text_of(offsets.strides()));
  if (row_scale) {
    check(row_scale->scalar_type() == ScalarType::Float && row_scale->dim() == 1 &&
              row_scale->size(0) == rows && row_scale->is_contiguous(),
          op, "row_scale must be contiguous torch.float32 [", rows, "], got ",
          name_of(row_scale->scalar_type()), " ", text_of(row_scale->sizes()));
  }
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
  const std::vector<int64_t> bounds = wide ? numbers<int64_t>(offsets) : numbers<int32_t>(offsets);
  check(
      bounds.front() == 0 && bounds.back() == rows && std::is_sorted(bounds.begin(), bounds.end()),
      op, "offsets must rise from 0 to x's ", rows, " rows, got ",
      text_of({bounds.data(), bounds.size()}));
  Moe moe = {op,
             dtype_of(op, x.scalar_type()),
             element(x, 0),
             x.stride(0),
             rows,
             x.size(1),
             out_features,
             {},
             output(x, {rows, out_features}, x.scalar_type()),
             row_scale ? reinterpret_cast<const float*>(element(*row_scale, 0)) : nullptr};
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(bounds.size()); ++e) {
    if (bounds[e] < bounds[e + 1]) moe.experts.push_back({e, bounds[e], bounds[e + 1]});
  }
  return moe;
}

void check_stack(const Moe& moe, const char* name, const std::optional<Tensor>& stack,
                 const Tensor& offsets) {
  if (!stack) return;
  const int64_t experts = offsets.size(0) - 1;
  check(stack->dim() >= 1 && stack->size(0) == experts && stack->is_contiguous(), moe.op, name,
        " must be contiguous, one for each of ", experts, " experts (offsets), got ",
        text_of(stack->sizes()));
}

}  // namespace qk::cpu
