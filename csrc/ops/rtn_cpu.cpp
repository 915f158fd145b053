// rtn_int and rtn_fp8 on the CPU.
#include "cpu/rtn_tiles.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

// Blocks that do not fit go through the separate ops, which read x twice.
bool fits(const Grid& grid) { return RtnTiles::fit(grid.block_rows, grid.block_cols); }

// f(tile, scratch) for every tile of the matrix.
template <typename Kernel>
void for_tiles(const RtnMatrix& matrix, const Kernel& kernel) {
  const RtnTiles tiles(matrix);
  parallel_rows(tiles.count(), tiles.elements(), [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(rtn_scratch_bytes(tiles.width()));
    for (int64_t i = begin; i < end; ++i) kernel(tiles.at(i, i + 1 < end), scratch.data());
  });
}

RtnMatrix matrix_of(const Tensor& x, const Grid& grid, Tensor& q, int64_t q_bits, Tensor& scale,
                    int8_t* zero_point) {
  return {x.const_data_ptr(),
          static_cast<int64_t>(x.element_size()),
          x.stride(0),
          x.size(0),
          x.size(1),
          grid.block_rows,
          grid.block_cols,
          data<void>(q),
          q_bits,
          q.size(1) * static_cast<int64_t>(q.element_size()),
          data<float>(scale),
          zero_point};
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
  const RtnMatrix matrix = matrix_of(x, grid, q, pack_bits ? pack_bits : 8, scale,
                                     symmetric ? nullptr : data<int8_t>(zero_point));
  for_tiles(matrix, [&](const BlockRow& tile, void* scratch) {
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
  for_tiles(matrix_of(x, grid, q, 8, scale, nullptr), [&](const BlockRow& tile, void* scratch) {
    rtn_kernels().rtn_fp8(from, to, tile, scratch);
  });
  return {q, scale};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("rtn_int", TORCH_BOX(&qk::cpu::rtn_int));
  m.impl("rtn_fp8", TORCH_BOX(&qk::cpu::rtn_fp8));
}
