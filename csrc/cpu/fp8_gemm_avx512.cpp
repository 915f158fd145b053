// The kernels of fp8_gemm.h for AVX-512; codes, and bf16 x, go to the units for dot products of
// pairs.
#include "cpu/panel_pairs_avx512.h"

namespace qk::avx512 {
namespace {

// 24 sums, 4 vectors of the weight and one number of x in 32 registers.
constexpr int kTileRows = 6, kTileVectors = 4;

// bf16 of codes s eeee mmm, NaN aside, a byte of the result at a time for all 64 codes at once:
//   upper byte   s and seven bits of the exponent: a look-up by s eee
//   lower byte   the exponent's last bit and the mantissa: e mmm 0000
// Subnormal codes have eeee = 0 and look both bytes up by mmm.
struct PairCodes {
  using Words = PairWords;
  static constexpr int kStep = 4;
  static constexpr bool kPlain = false;

  // In a register, not made anew in every loop: GCC takes constants for cheap.
  static QK_INLINE __m512i kept(__m512i x) {
    asm("" : "+v"(x));
    return x;
  }
  static QK_INLINE __m512i table(uint64_t low, uint64_t high) {
    return _mm512_broadcast_i32x4(
        _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)));
  }
  // 60 ... 67, then the same with a sign.
  const __m512i upper = table(0x43424140'3f3e3d3c, 0xc3c2c1c0'bfbebdbc);
  // Of m * 2^-9: the lower bytes, and what they have less than 60 above.
  const __m512i lower = table(0x60402000'c0800000, 0);
  const __m512i less = table(0x00000000'0101013c, 0);
  const __m512i nibble = kept(_mm512_set1_epi8(0x0f)), exponent = kept(_mm512_set1_epi8(0x78));

  // Vector 0 has the codes in the lower bytes of each 16 bits, vector 1 the others. What both share
  // is computed once.
  template <int i>
  QK_INLINE I32 at(I32 packed) const {
    const __m512i z = packed.v, mantissa = _mm512_and_si512(z, nibble);
    const __mmask64 subnormal = _mm512_testn_epi8_mask(z, exponent);
    __m512i a = _mm512_shuffle_epi8(upper, _mm512_and_si512(_mm512_srli_epi16(z, 4), nibble));
    a = _mm512_mask_sub_epi8(a, subnormal, a, _mm512_shuffle_epi8(less, mantissa));
    __m512i b = _mm512_slli_epi16(mantissa, 4);
    b = _mm512_mask_shuffle_epi8(b, subnormal, lower, mantissa);
    // The other byte of each 16 bits comes from next to it.
    const __mmask64 low = 0x5555555555555555;
    return {i == 0 ? _mm512_mask_blend_epi8(low, _mm512_slli_epi16(a, 8), b)
                   : _mm512_mask_blend_epi8(low, a, _mm512_srli_epi16(b, 8))};
  }
};

}  // namespace
}  // namespace qk::avx512

#include "cpu/fp8_gemm.inl"
