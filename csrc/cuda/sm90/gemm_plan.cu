// Which tiles a product gets, and the way to its kernel.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

using KindInt4 = KindSixteen<WeightInt4<BFloat16>>;
using KindInt4Half = KindSixteen<WeightInt4<Float16>>;

template <>
cudaError_t gemm_of<KindInt8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<KindFloat8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<KindInt4>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<KindInt4Half>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);

namespace {

// Calls f with the kind that multiplies this weight by activations of this dtype.
template <typename Function>
auto with_kind(WeightKind kind, DType dtype, Function f) {
  if (kind == WeightKind::kInt8) return f(KindInt8{});
  if (kind == WeightKind::kFloat8) return f(KindFloat8{});
  return dtype == DType::kFloat16 ? f(KindInt4Half{}) : f(KindInt4{});
}

constexpr int kBusy = 132;  // multiprocessors of an H100 or H200

}  // namespace

bool takes(WeightKind kind, DType dtype, const GemmArgs& args) {
  if (reinterpret_cast<uintptr_t>(args.weight.words) % 16 != 0 || args.a.planes != 1 ||
      args.a.depth < 1) {
    return false;
  }
  switch (kind) {
    case WeightKind::kInt8:
      return true;
    case WeightKind::kFloat8:
      return dtype == DType::kFloat8E4M3 && args.groups.segment % KindFloat8::kDepth == 0;
    case WeightKind::kInt4:
      return args.groups.segment % KindInt4::kDepth == 0;
    default:
      return false;
  }
}

GemmPlan plan_gemm(WeightKind kind, DType dtype, const GemmArgs& args) {
  const int experts = args.experts.count;
  const int64_t rows = experts == 0 ? args.a.rows : ceil_div(args.a.rows, experts);
  // Sums of floats take twice the registers: tiles of 256 rows are for integers.
  const int shape = kind == WeightKind::kInt8 && rows > 128 ? 1 : 0;
  return with_kind(kind, dtype, [&](auto of) {
    return plan_tiles(args, shape,
                      {shape == 0 ? 128 : 256, kPanels * kPanel, decltype(of)::kDepth, 1, kBusy},
                      false);
  });
}

cudaError_t gemm(WeightKind kind, DType dtype, const GemmArgs& args, const GemmPlan& plan,
                 void* workspace, cudaStream_t stream) {
  return with_kind(kind, dtype,
                   [&](auto of) { return gemm_of<decltype(of)>(args, plan, workspace, stream); });
}

}  // namespace qk::cuda::sm90
