// See pack.h.
#pragma once

#include "cpu/numeric.inl"
#include "cpu/pack.h"

namespace qk::QK_ISA {
namespace {

inline void row_pack(const int8_t* codes, int64_t cols, int num_bits, int32_t* words) {
  uint8_t* out = reinterpret_cast<uint8_t*>(words);
  int64_t bytes;
  if (num_bits == 8) {
    for (bytes = 0; bytes < cols; ++bytes) out[bytes] = static_cast<uint8_t>(codes[bytes] ^ 0x80);
  } else {
    int64_t i = 0;
    for (; i + kNibbleCodes <= cols; i += kNibbleCodes) pack_nibbles(codes + i, out + i / 2);
    for (; i < cols; i += 2) {
      const int low = (codes[i] ^ 8) & 15, high = i + 1 < cols ? (codes[i + 1] ^ 8) & 15 : 0;
      out[i / 2] = static_cast<uint8_t>(low | high << 4);
    }
    bytes = (cols + 1) / 2;
  }
  for (; bytes % 4 != 0; ++bytes) out[bytes] = 0;
}

inline void row_unpack(const int32_t* words, int64_t cols, int num_bits, int8_t* codes) {
  const uint8_t* in = reinterpret_cast<const uint8_t*>(words);
  int64_t i = 0;
  if (num_bits == 8) {
    for (; i < cols; ++i) codes[i] = static_cast<int8_t>(in[i] ^ 0x80);
    return;
  }
  for (; i + kNibbleCodes <= cols; i += kNibbleCodes) unpack_nibbles(in + i / 2, codes + i);
  for (; i < cols; ++i) codes[i] = static_cast<int8_t>(((in[i / 2] >> (i % 2 * 4)) & 15) - 8);
}

}  // namespace
}  // namespace qk::QK_ISA
