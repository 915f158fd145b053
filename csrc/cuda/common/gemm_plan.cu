// Which tiles a product gets and into how many parts K is split; and the way to its kernel.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {
namespace {

// Blocks that keep a large device busy: two for each of its multiprocessors, of tiles of few rows.
constexpr int kBusyFew = 264, kBusy = 132;
constexpr int kMostSplits = 16;
constexpr int kLeastStages = 4;  // of a part

// Calls f with the weight of the kind, for segments of so many columns.
template <typename Function>
auto with_weight(WeightKind kind, DType dtype, int segment, Function f) {
  const bool half = dtype == DType::kFloat16;
  switch (kind) {
    case WeightKind::kInt8:
      return f(WeightInt8{});
    case WeightKind::kInt4ByInt8:
      return segment % WeightInt4ByInt8::kUnit == 0 ? f(WeightInt4ByInt8{})
                                                    : f(WeightInt4ByInt8Short{});
    case WeightKind::kInt4:
      return half ? f(WeightInt4<Float16>{}) : f(WeightInt4<BFloat16>{});
    case WeightKind::kByte:
      return half ? f(WeightByte<Float16>{}) : f(WeightByte<BFloat16>{});
    case WeightKind::kFloat8:
      if (dtype == DType::kFloat8E4M3) return f(WeightFloat8Codes{});
      return half ? f(WeightFloat8<Float16>{}) : f(WeightFloat8<BFloat16>{});
    default:
      return f(WeightBFloat16{});
  }
}

}  // namespace

GemmPlan plan_tiles(const GemmArgs& args, int shape, const TileExtent& tile, bool whole_segments) {
  const int rows = args.a.rows, experts = args.experts.count;
  GemmPlan plan = {};
  plan.shape = shape;
  // Each expert may have a tile that is not full.
  plan.row_tiles = experts == 0 ? static_cast<int>(ceil_div(rows, tile.rows))
                                : rows / tile.rows + (experts < rows ? experts : rows);
  plan.panel_tiles = static_cast<int>(ceil_div(args.weight.out_features, tile.cols));
  const int64_t units = ceil_div(args.a.depth, tile.unit);
  const int64_t tiles = int64_t{plan.row_tiles} * plan.panel_tiles;
  int64_t splits = tile.busy / tiles;
  const int64_t most = units / (tile.stage_units * kLeastStages);
  splits = splits < most ? splits : most;
  splits = splits < kMostSplits ? splits : kMostSplits;
  const bool whole = whole_segments && args.groups.segment == 0;
  if (splits < 2 || whole) splits = 1;
  // Parts are whole stages, and whole segments where their order counts.
  int64_t step = tile.stage_units;
  if (splits > 1 && whole_segments) step = args.groups.segment / tile.unit;
  const int64_t length = ceil_div(ceil_div(units, splits), step) * step;
  plan.split_units = static_cast<int>(length > 0 ? length : 1);
  plan.splits = static_cast<int>(units > 0 ? ceil_div(units, plan.split_units) : 1);
  if (plan.splits > 1) {
    const int64_t parts = whole_segments ? args.groups.groups : plan.splits;
    plan.workspace = parts * rows * part_pitch(args.weight.out_features);
  }
  return plan;
}

GemmPlan plan_gemm(WeightKind kind, DType dtype, const GemmArgs& args) {
  const int experts = args.experts.count;
  const int64_t rows = experts == 0 ? args.a.rows : ceil_div(args.a.rows, experts);
  const int shape = rows <= 16 ? 0 : rows <= 32 ? 1 : rows <= 64 ? 2 : 3;
  return with_weight(kind, dtype, args.groups.segment, [&](auto weight) {
    using Weight = decltype(weight);
    if (args.groups.segment % Weight::kUnit != 0) {
      GemmPlan odd = {};
      odd.shape = kOddGroups;
      return odd;
    }
    return with_tiles<Weight>(shape, [&](auto tiles) {
      using Shape = decltype(tiles);
      return plan_tiles(
          args, shape,
          {Shape::kRows, Shape::kCols, Weight::kUnit, Shape::kUnits, shape == 0 ? kBusyFew : kBusy},
          Weight::kScaling == Scaling::kIntGroups);
    });
  });
}

cudaError_t gemm(WeightKind kind, DType dtype, const GemmArgs& args, const GemmPlan& plan,
                 void* workspace, cudaStream_t stream) {
  if (plan.shape == kOddGroups) return gemm_of_odd_groups(kind, dtype, args, stream);
  return with_weight(kind, dtype, args.groups.segment, [&](auto weight) {
    using Weight = decltype(weight);
    if constexpr (__is_same(Weight, WeightFloat8Codes)) {
      GemmArgs cut = args;
      cut.groups.segment =
          args.groups.segment % kFloat8Columns == 0 ? kFloat8Columns : kFloat8Segment;
      return gemm_of<Weight>(cut, plan, workspace, stream);
    } else {
      return gemm_of<Weight>(args, plan, workspace, stream);
    }
  });
}

}  // namespace qk::cuda
