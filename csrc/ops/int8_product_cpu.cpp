// How an int8 product is spread over threads: a chunk of rows is quantized by all of them, then
// each takes panels of 64 columns of the result.
#include <algorithm>

#include "ops/arena.h"
#include "ops/w8a8.h"

namespace qk::cpu {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;     // of codes: scratch stays bounded, and in the L3 cache
constexpr int64_t kLeastChunk = 192;         // rows that make reading the weights once more cheap
constexpr int64_t kQuantizeElements = 8192;  // a thread takes at a time
constexpr int64_t kPieceRows = 96;           // of one panel, at least
constexpr int64_t kPieces = 64;              // for each thread, or the last ones come out uneven
constexpr int64_t kFirstBytes = 16 << 10;    // of its first panel, fetched while rows are quantized
constexpr int64_t kThreadBytes = 64 << 10;   // of weights that are worth waking a thread for

const void* shift(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

}  // namespace

void int8_product(const Tensor& like, const Int8Product& product) {
  const W8A8Kernels& kernels = w8a8_kernels();
  const int64_t cols = product.input.cols, row_bytes = w8a8_row_bytes(cols);
  const int64_t panels = (product.out_features + kPanel - 1) / kPanel;
  const int64_t panel_bytes = w8a8_panel_bytes(cols);
  const int64_t most = std::max(kLeastChunk, kChunkBytes / row_bytes);
  const int64_t chunks = (product.rows + most - 1) / most;
  const int64_t chunk = (product.rows + chunks - 1) / chunks;
  const int64_t worth = std::max(panels * panel_bytes, product.rows * cols) / kThreadBytes + 1;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), worth);

  Arena arena;
  const int64_t sums_size = std::max<int64_t>(chunk, 8) * kPanel;
  const int64_t codes = arena.reserve<uint8_t>(chunk * row_bytes),
                scale = arena.reserve<float>(chunk), offset = arena.reserve<int32_t>(chunk),
                sums = arena.reserve<int32_t>(threads * sums_size),
                more = arena.reserve<float>(product.wide.count ? threads * sums_size : 0),
                copy = arena.reserve<float>(product.wide.count ? threads * cols : 0);
  arena.allocate(like);

  Int8Input input = product.input;
  input.left_out = product.wide.columns;
  input.left_out_count = product.wide.count;
  Int8Task task = product.task;
  task.rows = {arena.at<uint8_t>(codes), row_bytes, arena.at<float>(scale),
               arena.at<int32_t>(offset)};
  task.cols = cols;
  const int64_t element_bytes =
      task.dtype == DType::kFloat16 || task.dtype == DType::kBFloat16 ? 2 : 4;
  const int64_t input_bytes = input.dtype == DType::kInt8      ? 1
                              : input.dtype == DType::kFloat32 ? 4
                                                               : 2;
  const int64_t group = kQuantizeElements / (cols + 1) + 1;
  for (int64_t from = 0; from < product.rows; from += chunk) {
    const int64_t rows = std::min(chunk, product.rows - from);
    input.x = static_cast<const char*>(product.input.x) + from * input.stride * input_bytes;
    const int64_t pieces = std::min(std::max<int64_t>(1, rows / kPieceRows),
                                    (kPieces * threads + panels - 1) / panels);
    parallel_stages(
        threads,
        [&](int64_t i) {
          const int8_t* const panel = product.packed + i / pieces * panel_bytes;
          const int64_t bytes = std::min(panel_bytes, kFirstBytes);
          for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(panel + line, 0, 2);
        },
        (rows + group - 1) / group,
        [&](int64_t i, int64_t thread) {
          kernels.quantize(input, i * group, std::min(rows, (i + 1) * group), task.rows,
                           arena.at<float>(copy) + thread * cols);
        },
        panels * pieces,
        [&](int64_t i, int64_t next, int64_t thread) {
          const int64_t panel = i / pieces, piece = i % pieces, column = panel * kPanel;
          Int8Task own = task;
          own.begin = rows * piece / pieces;
          own.end = rows * (piece + 1) / pieces;
          own.panel = product.packed + panel * panel_bytes;
          own.next = next / pieces != panel && next / pieces < panels
                         ? product.packed + next / pieces * panel_bytes
                         : nullptr;
          own.sums = arena.at<int32_t>(sums) + thread * sums_size;
          own.columns = std::min(kPanel, product.out_features - column);
          own.out = static_cast<char*>(task.out) + (from * task.stride + column) * element_bytes;
          if (task.scale && !task.one_scale) own.scale = task.scale + column;
          if (task.bias) own.bias = shift(task.bias, task.bias_dtype, column);
          if (product.wide.count) {
            float* const extra = arena.at<float>(more) + thread * sums_size;
            kernels.multiply_columns(own.panel, product.wide.columns, product.wide.count,
                                     product.wide.x + (from + own.begin) * product.wide.count,
                                     own.end - own.begin, extra);
            own.more = extra - own.begin * kPanel;
          }
          kernels.multiply(own);
        });
  }
}

}  // namespace qk::cpu
