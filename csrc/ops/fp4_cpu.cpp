// quantize_fp4 and unpack_fp4 on the CPU.
#include "cpu/fp4.h"

#include <array>
#include <cstring>

#include "ops/pack_check.h"
#include "ops/scales.h"

namespace qk::cpu {
namespace {

// The two e4m3 codes, the lower nibble's first, of the values in a byte.
constexpr std::array<std::array<uint8_t, 2>, 256> kPairs = [] {
  constexpr uint8_t kCodes[] = {0x00, 0x30, 0x38, 0x3c, 0x40, 0x44, 0x48, 0x4c,
                                0x80, 0xb0, 0xb8, 0xbc, 0xc0, 0xc4, 0xc8, 0xcc};
  std::array<std::array<uint8_t, 2>, 256> pairs{};
  for (int byte = 0; byte < 256; ++byte) pairs[byte] = {kCodes[byte & 15], kCodes[byte >> 4]};
  return pairs;
}();

}  // namespace

Tensor quantize_fp4(const Tensor& x, const Tensor& scale, int64_t group_size) {
  constexpr auto kOp = "quantize_fp4";
  const Grid grid = check_quantize_fp4(kOp, x, scale, group_size);
  check_rows(kOp, "x", x);
  Tensor q = output(x, {x.size(0), x.size(1) / 2}, ScalarType::Byte);
  if (x.numel() == 0) return q;
  const Scales scales = scales_of(grid, scale, std::nullopt);
  const DType dtype = dtype_of(kOp, x.scalar_type());
  parallel_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
    fp4_kernels().quantize(dtype, rows_of(x, begin, end), scales, data<uint8_t>(q));
  });
  return q;
}

Tensor unpack_fp4(const Tensor& packed) {
  constexpr auto kOp = "unpack_fp4";
  check_unpack_fp4(kOp, packed);
  const int64_t rows = packed.size(0), bytes = packed.size(1);
  Tensor codes = output(packed, {rows, 2 * bytes}, ScalarType::Float8_e4m3fn);
  if (codes.numel() == 0) return codes;
  parallel_rows(rows, 2 * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto* from = reinterpret_cast<const uint8_t*>(element(packed, r * packed.stride(0)));
      uint8_t* to = data<uint8_t>(codes) + r * 2 * bytes;
      for (int64_t i = 0; i < bytes; ++i) std::memcpy(to + 2 * i, kPairs[from[i]].data(), 2);
    }
  });
  return codes;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("quantize_fp4", TORCH_BOX(&qk::cpu::quantize_fp4));
  m.impl("unpack_fp4", TORCH_BOX(&qk::cpu::unpack_fp4));
}
