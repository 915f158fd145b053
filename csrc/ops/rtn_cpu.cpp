// rtn_int and rtn_fp8 on the CPU.
#include "cpu/rtn.h"

#include <algorithm>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

// A row of blocks is worked on in tiles that stay in a cache between reading the extremes and
// writing the codes: L1 for rows, L2 for blocks of many rows.
constexpr int64_t kRowElements = 4096;
constexpr int64_t kTileElements = 128 * 1024;

// Blocks of so many rows no longer fit it: those go through the separate ops, which read x twice.
bool fits(const Grid& grid) {
  return grid.block_rows == 1 ||
         (grid.block_rows <= 256 && grid.block_rows * grid.block_cols <= kTileElements);
}

// f(block row, scratch) for every tile of x. `q_bits` is the size of a code in q, `q_row` the bytes
// of a row of q.
template <typename Kernel>
void for_tiles(const Tensor& x, const Grid& grid, void* q, int64_t q_bits, int64_t q_row,
               float* scale, int8_t* zero_point, const Kernel& kernel) {
  const int64_t rows = x.size(0), cols = x.size(1);
  // A multiple of eight blocks, so that no two tiles share a word of packed codes.
  const int64_t step = 8 * grid.block_cols;
  const int64_t wanted = grid.block_rows == 1 ? kRowElements : kTileElements / grid.block_rows;
  const int64_t tile = std::min(cols, std::max<int64_t>(1, wanted / step) * step);
  const int64_t tiles = (cols + tile - 1) / tile;
  parallel_rows(grid.rows * tiles, grid.block_rows * tile, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(rtn_scratch_bytes(tile));
    const auto at = [&](int64_t i) {  // where tile i of x begins
      return element(x, i / tiles * grid.block_rows * x.stride(0) + i % tiles * tile);
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / tiles, row = g * grid.block_rows, col = i % tiles * tile;
      const int64_t first = g * grid.cols + col / grid.block_cols;
      kernel(BlockRow{at(i), i + 1 < end ? at(i + 1) : nullptr, x.stride(0),
                      std::min(grid.block_rows, rows - row), std::min(tile, cols - col),
                      grid.block_cols, static_cast<char*>(q) + row * q_row + col * q_bits / 8,
                      q_row, scale + first, zero_point ? zero_point + first : nullptr},
             scratch.data());
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rtn_int(const Tensor& x, const Block& block, int64_t q_min,
                                           int64_t q_max, bool symmetric, double divisor,
                                           ScalarType scale_dtype, int64_t pack_bits) {
  constexpr auto kOp = "rtn_int";
  const Grid grid = check_matrix(kOp, x, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check_code_range(kOp, q_min, q_max);
  check(pack_bits == 0 || pack_bits == 4 || pack_bits == 8, kOp,
        "pack_bits must be 0, 4 or 8, got ", pack_bits);
  check_scale_dtype(kOp, scale_dtype);
  if (!fits(grid)) {
    Tensor scale, zero_point = empty(x, {0}, ScalarType::Char);
    if (symmetric) {
      scale = symmetric_scale(absmax(x, block), divisor, scale_dtype);
    } else {
      const auto [low, high] = minmax(x, block);
      std::tie(scale, zero_point) = asymmetric_scale(low, high, q_min, q_max, scale_dtype);
    }
    const auto zero_points = symmetric ? std::nullopt : std::optional<Tensor>(zero_point);
    const Tensor q = quantize_int(x, scale, zero_points, block, q_min, q_max);
    return {pack_bits ? pack_int32(q, pack_bits) : q, scale, zero_point};
  }
  const int64_t rows = x.size(0), cols = x.size(1);
  const int64_t width = pack_bits ? (cols * pack_bits + 31) / 32 : cols;
  Tensor q = output(x, {rows, width}, pack_bits ? ScalarType::Int : ScalarType::Char);
  Tensor scale = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  Tensor zero_point = symmetric ? empty(x, {0}, ScalarType::Char)
                                : empty(x, {grid.rows, grid.cols}, ScalarType::Char);
  if (x.numel() == 0) return {q, scale, zero_point};
  const RtnInt how{
      static_cast<int>(q_min),     static_cast<int>(q_max),    symmetric,
      static_cast<float>(divisor), dtype_of(kOp, scale_dtype), static_cast<int>(pack_bits)};
  const DType dtype = dtype_of(kOp, x.scalar_type());
  for_tiles(x, grid, data<void>(q), pack_bits ? pack_bits : 8, width * (pack_bits ? 4 : 1),
            data<float>(scale), symmetric ? nullptr : data<int8_t>(zero_point),
            [&](const BlockRow& tile, void* scratch) {
              rtn_kernels().rtn_int(dtype, how, tile, scratch);
            });
  return {q, scale, zero_point};
}

std::tuple<Tensor, Tensor> rtn_fp8(const Tensor& x, const Block& block, ScalarType dtype) {
  constexpr auto kOp = "rtn_fp8";
  const Grid grid = check_matrix(kOp, x, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check_fp8_dtype(kOp, dtype);
  if (!fits(grid)) {
    const double divisor = dtype == ScalarType::Float8_e4m3fn ? Float8E4M3::kMax : Float8E5M2::kMax;
    const Tensor scale = symmetric_scale(absmax(x, block), divisor, ScalarType::Float);
    return {quantize_fp8(x, scale, block, dtype), scale};
  }
  Tensor q = output(x, {x.size(0), x.size(1)}, dtype);
  Tensor scale = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  if (x.numel() == 0) return {q, scale};
  const DType from = dtype_of(kOp, x.scalar_type()), to = dtype_of(kOp, dtype);
  for_tiles(
      x, grid, data<void>(q), 8, x.size(1), data<float>(scale), nullptr,
      [&](const BlockRow& tile, void* scratch) { rtn_kernels().rtn_fp8(from, to, tile, scratch); });
  return {q, scale};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("rtn_int", TORCH_BOX(&qk::cpu::rtn_int));
  m.impl("rtn_fp8", TORCH_BOX(&qk::cpu::rtn_fp8));
}
