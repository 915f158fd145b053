// pack_int32 and unpack_int32 on the CPU.
#include "cpu/pack.h"

#include "ops/cpu_ops.h"

namespace qk::cpu {

Tensor pack_int32(const Tensor& codes, int64_t num_bits) {
  check_packing("pack_int32", codes, ScalarType::Char, num_bits);
  check_rows("pack_int32", "codes", codes);
  const int64_t rows = codes.size(0), cols = codes.size(1), words = (cols * num_bits + 31) / 32;
  Tensor packed = output(codes, {rows, words}, ScalarType::Int);
  if (packed.numel() == 0) return packed;
  parallel_rows(rows, cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      pack_kernels().pack(reinterpret_cast<const int8_t*>(element(codes, r * codes.stride(0))),
                          cols, static_cast<int>(num_bits), data<int32_t>(packed) + r * words);
    }
  });
  return packed;
}

Tensor unpack_int32(const Tensor& packed, int64_t num_bits, int64_t cols) {
  constexpr auto kOp = "unpack_int32";
  check_packing(kOp, packed, ScalarType::Int, num_bits);
  check_rows(kOp, "packed", packed);
  const int64_t rows = packed.size(0), words = (cols * num_bits + 31) / 32;
  check(cols >= 0 && packed.size(1) == words, kOp, cols, " columns of ", num_bits, " bits take ",
        words, " words a row, packed has ", packed.size(1));
  Tensor codes = output(packed, {rows, cols}, ScalarType::Char);
  if (codes.numel() == 0) return codes;
  parallel_rows(rows, cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      pack_kernels().unpack(reinterpret_cast<const int32_t*>(element(packed, r * packed.stride(0))),
                            cols, static_cast<int>(num_bits), data<int8_t>(codes) + r * cols);
    }
  });
  return codes;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("pack_int32", TORCH_BOX(&qk::cpu::pack_int32));
  m.impl("unpack_int32", TORCH_BOX(&qk::cpu::unpack_int32));
}
