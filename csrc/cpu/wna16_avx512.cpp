// The kernels of wna16.h for AVX-512; bf16 goes to the units for dot products of pairs.
#include "cpu/panel_pairs_avx512.h"
#include "cpu/transpose_avx512.h"

namespace qk::avx512 {
namespace {

// 24 sums, 4 vectors of the weight and one number of x in 32 registers.
constexpr int kTileRows = 6, kTileVectors = 4;

template <int kBits>
struct PairCodes;

// A look-up by the lowest five bits of each 16: the table is there twice, so that the fifth bit,
// which is the next code's, does not matter.
template <>
struct PairCodes<4> {
  using Words = PairWords;
  static constexpr int kStep = 8;
  static constexpr bool kPlain = false;
  // bf16 of -8 ... 7
  static constexpr uint16_t kValues[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                                           0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040,
                                           0x4080, 0x40a0, 0x40c0, 0x40e0};
  const __m512i table =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kValues)));
  template <int i>
  QK_INLINE I32 at(I32 packed) const {
    return {_mm512_permutexvar_epi16(shift_right<4 * i>(packed).v, table)};
  }
};

// 2^8 + code as fp32, whose bits are those of the code in their place, less 2^8 + 2^7: exact, and
// the upper 16 bits are bf16.
template <>
struct PairCodes<8> {
  using Words = PairWords;
  static constexpr int kStep = 4;
  static constexpr bool kPlain = false;
  static QK_INLINE I32 number(I32 in_place) {
    const __m512i sum = _mm512_ternarylogic_epi32(in_place.v, _mm512_set1_epi32(0x007f8000),
                                                  _mm512_set1_epi32(0x43800000), 0xea);
    return bits(F32{_mm512_castsi512_ps(sum)} - broadcast(384.0f));
  }
  template <int i>
  QK_INLINE I32 at(I32 packed) const {
    const I32 even = number(i == 0 ? shift_left<15>(packed) : shift_left<7>(packed));
    const I32 odd = number(i == 0 ? shift_right<1>(packed) : shift_right<9>(packed));
    return shift_right<16>(even) | odd;
  }
};

template <>
struct PairCodes<16> {
  using Words = PairWords;
  static constexpr int kStep = 2;
  static constexpr bool kPlain = true;
  template <int i>
  QK_INLINE I32 at(I32 packed) const {
    return packed;
  }
};

}  // namespace
}  // namespace qk::avx512

#include "cpu/wna16.inl"
