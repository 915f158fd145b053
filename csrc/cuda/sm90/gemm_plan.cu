// Which tiles a product gets, and the way to its kernel.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

template <>
cudaError_t gemm_of<KindInt8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);

namespace {

// Calls f with the kind that multiplies this weight by activations of this dtype.
template <typename Function>
auto with_kind(WeightKind, Function f) {
  return f(KindInt8{});
}

constexpr int kBusy = 132;  // multiprocessors of an H100 or H200

}  // namespace

bool takes(WeightKind kind, DType, const GemmArgs& args) {
  if (reinterpret_cast<uintptr_t>(args.weight.words) % 16 != 0 || args.a.planes != 1 ||
      args.a.depth < 1) {
    return false;
  }
  return kind == WeightKind::kInt8;
}

GemmPlan plan_gemm(WeightKind kind, const GemmArgs& args) {
  const int experts = args.experts.count;
  const int64_t rows = experts == 0 ? args.a.rows : ceil_div(args.a.rows, experts);
  const int shape = kind == WeightKind::kInt8 && rows > 128 ? 1 : 0;
  return with_kind(kind, [&](auto of) {
    using Kind = decltype(of);
    return plan_tiles(args, shape,
                      {shape == 0 ? 128 : 256, kPanels * kPanel, Kind::kDepth, 1, kBusy}, false);
  });
}

cudaError_t gemm(WeightKind kind, DType, const GemmArgs& args, const GemmPlan& plan,
                 void* workspace, cudaStream_t stream) {
  return with_kind(kind,
                   [&](auto of) { return gemm_of<decltype(of)>(args, plan, workspace, stream); });
}

}  // namespace qk::cuda::sm90
