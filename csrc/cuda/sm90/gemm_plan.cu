// Which tiles a product gets, and the way to its kernel.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

namespace {

// Calls f with the kind that multiplies this weight by activations of this dtype.
template <typename Function>
auto with_kind(WeightKind kind, DType dtype, Function f) {
  const bool half = dtype == DType::kFloat16;
  switch (kind) {
    case WeightKind::kInt8:
      return f(KindInt8{});
    case WeightKind::kInt4ByInt8:
      return f(KindInt4ByInt8{});
    case WeightKind::kInt4:
      return half ? f(KindSixteen<WeightInt4<Float16>>{}) : f(KindSixteen<WeightInt4<BFloat16>>{});
    case WeightKind::kByte:
      return half ? f(KindSixteen<WeightByte<Float16>>{}) : f(KindSixteen<WeightByte<BFloat16>>{});
    case WeightKind::kFloat8:
      if (dtype == DType::kFloat8E4M3) return f(KindFloat8{});
      return half ? f(KindSixteen<WeightFloat8<Float16>>{})
                  : f(KindSixteen<WeightFloat8<BFloat16>>{});
    default:
      return f(KindSixteen<WeightBFloat16>{});
  }
}

constexpr int kBusy = 132;  // multiprocessors of an H100 or H200

}  // namespace

bool takes(WeightKind kind, DType dtype, const GemmArgs& args) {
  if (args.a.planes != 1 || args.a.depth < 1) return false;
  return with_kind(kind, dtype, [&](auto of) {
    using Kind = decltype(of);
    // What the bulk copies ask for; activations that are not there yet will be made so.
    const bool overlap = args.a.data != nullptr && args.a.rows > 1 &&
                         args.a.row_bytes < int64_t{args.a.depth} * (kStageBytes / Kind::kDepth);
    if (overlap) return false;
    return !Kind::kTotals || args.groups.segment % Kind::kDepth == 0;
  });
}

bool pays(WeightKind kind, const GemmArgs& args) {
  const int64_t experts = args.experts.count > 1 ? args.experts.count : 1;
  if (args.a.rows < kLeastRows * experts) return false;
  const int64_t tiles = ceil_div(args.a.rows, 128) * ceil_div(args.weight.out_features, 128);
  return kind != WeightKind::kInt4ByInt8 || tiles >= kBusy / 2;
}

GemmPlan plan_gemm(WeightKind kind, DType dtype, const GemmArgs& args) {
  const int experts = args.experts.count;
  const int64_t rows = experts == 0 ? args.a.rows : ceil_div(args.a.rows, experts);
  // Sums of floats take twice the registers: tiles of 256 rows are for integers.
  const int shape = kind == WeightKind::kInt8 && rows > 128 ? 1 : 0;
  return with_kind(kind, dtype, [&](auto of) {
    using Kind = decltype(of);
    // Groups of int8 by int4 are added in their order: K is not split.
    return plan_tiles(
        args, shape,
        {shape == 0 ? 128 : 256, kPanels * kPanel, Kind::kDepth, 1, Kind::kIntGroups ? 0 : kBusy},
        false);
  });
}

cudaError_t gemm(WeightKind kind, DType dtype, const GemmArgs& args, const GemmPlan& plan,
                 void* workspace, cudaStream_t stream) {
  return with_kind(kind, dtype,
                   [&](auto of) { return gemm_of<decltype(of)>(args, plan, workspace, stream); });
}

}  // namespace qk::cuda::sm90
