// pack_w4a8 and w4a8_gemm on the CPU.
#include "cpu/w4a8.h"

#include "ops/arena.h"
#include "ops/pack_check.h"
#include "ops/w8a8.h"

namespace qk::cpu {
namespace {

using Optional = std::optional<Tensor>;
constexpr auto kOp = "w4a8_gemm";
constexpr int64_t kChunkBytes = 4 << 20;     // of codes: they stay in the L3 cache
constexpr int64_t kLeastChunk = 192;         // rows that make reading the weights once more cheap
constexpr int64_t kQuantizeElements = 8192;  // a thread takes at a time
constexpr int64_t kPieceRows = 24;           // least rows of a piece, where panels are few
constexpr int64_t kThreadElements = 128 << 10;  // of weights that are worth waking a thread for

// Scales or zero points by panels: as they are, or made from [N, G].
Tensor by_panels(const Tensor& values) {
  if (values.dim() == 3) return values;
  const int64_t rows = values.size(0), groups = values.size(1), panels = w4a8_panels(rows);
  Tensor packed = output(values, {panels, groups, kW4Panel}, values.scalar_type());
  char* const to = static_cast<char*>(packed.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(values.element_size());
  parallel_rows(panels, groups * kW4Panel, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      w4a8_pack_scales(element(values, 0), bytes, rows, groups, p, to);
    }
  });
  return packed;
}

// x by the weight, in chunks of rows: each is quantized by all threads, then they take panels.
void product(const Tensor& x, const W4A8Weight& weight, const Tensor& out) {
  const W4A8Kernels& kernels = w4a8_kernels();
  const int64_t total = x.size(0), cols = x.size(1), groups = weight.groups();
  const int64_t row_bytes = w4a8_row_bytes(cols), panels = w4a8_panels(weight.rows);
  const int64_t most = std::max(kLeastChunk, kChunkBytes / row_bytes);
  const int64_t chunks = (total + most - 1) / most, chunk = (total + chunks - 1) / chunks;
  const int64_t worth = std::max(panels * kW4Panel, total * 2) * cols / kThreadElements + 1;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), worth);
  const int64_t group = kQuantizeElements / (cols + 1) + 1;  // of rows

  Arena arena;
  const int64_t codes = arena.reserve<int8_t>(chunk * row_bytes),
                scale = arena.reserve<float>(chunk), minus = arena.reserve<int32_t>(chunk * groups),
                sums = arena.reserve<float>(threads * chunk * kW4Panel);
  arena.allocate(x);
  W4A8Task task = {};
  task.tokens = {arena.at<int8_t>(codes), row_bytes, arena.at<float>(scale),
                 arena.at<int32_t>(minus)};
  task.dtype = dtype_of(kOp, x.scalar_type());
  task.stride = weight.rows;
  for (int64_t from = 0; from < total; from += chunk) {
    const int64_t rows = std::min(chunk, total - from);
    const char* const input = element(x, from * x.stride(0));
    char* const result = static_cast<char*>(out.mutable_data_ptr()) +
                         from * weight.rows * static_cast<int64_t>(out.element_size());
    // Where panels are few, a piece is one by some of the rows.
    const int64_t pieces =
        std::min((rows + kPieceRows - 1) / kPieceRows, (8 * threads + panels - 1) / panels);
    parallel_stages(
        threads, [&](int64_t i) { kernels.fetch(weight, i / pieces); }, (rows + group - 1) / group,
        [&](int64_t i, int64_t) {
          kernels.quantize(task.dtype, input, x.stride(0), cols, weight.group, i * group,
                           std::min(rows, (i + 1) * group), task.tokens);
        },
        panels * pieces,
        [&](int64_t i, int64_t next, int64_t thread) {
          W4A8Task own = task;
          own.panel = i / pieces;
          own.begin = rows * (i % pieces) / pieces;
          own.end = rows * (i % pieces + 1) / pieces;
          next /= pieces;
          own.next = next != own.panel && next < panels ? next : -1;
          own.sums = arena.at<float>(sums) + thread * chunk * kW4Panel;
          own.out = result;
          kernels.multiply(weight, own);
        });
  }
}

}  // namespace

Tensor pack_w4a8(const Tensor& words, int64_t in_features) {
  constexpr auto kPack = "pack_w4a8";
  check_pack_w4a8(kPack, words, in_features);
  const int64_t rows = words.size(0), depth = words.size(1), panels = w4a8_panels(rows);
  Tensor packed = output(words, {panels, depth, kW4Panel}, ScalarType::Int);
  if (packed.numel() == 0) return packed;
  const auto* const from = reinterpret_cast<const uint32_t*>(element(words, 0));
  const int64_t stride = words.stride(0);
  uint32_t* const to = data<uint32_t>(packed);
  parallel_rows(panels, depth * kW4Panel, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) w4a8_pack(from, stride, rows, in_features, p, to);
  });
  return packed;
}

Tensor w4a8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                 int64_t out_features, int64_t group_size, const Optional& weight_zero_point,
                 const Optional& bias) {
  const int64_t group = check_w4a8_gemm(kOp, x, packed, weight_scale, out_features, group_size,
                                        weight_zero_point, bias);
  const int64_t cols = x.size(1);
  Tensor out = output(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;

  const Tensor scale = by_panels(weight_scale);
  const Tensor zero_point = weight_zero_point ? by_panels(*weight_zero_point) : scale;
  W4A8Weight weight = {};
  weight.words = static_cast<const uint32_t*>(packed.const_data_ptr());
  weight.scale_dtype = dtype_of(kOp, scale.scalar_type());
  weight.scale = scale.const_data_ptr();
  if (weight_zero_point) {
    weight.zero_point = static_cast<const int8_t*>(zero_point.const_data_ptr());
  }
  weight.rows = out_features;
  weight.cols = cols;
  weight.group = group;
  if (bias) {
    weight.bias = bias->const_data_ptr();
    weight.bias_dtype = dtype_of(kOp, bias->scalar_type());
  }
  product(x, weight, out);
  return out;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("pack_w4a8", TORCH_BOX(&qk::cpu::pack_w4a8));
  m.impl("w4a8_gemm", TORCH_BOX(&qk::cpu::w4a8_gemm));
}
