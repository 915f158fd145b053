// The kernels of attention.h for AVX-512: vpdpbusd multiplies codes of four, vdpbf16ps pairs of
// bf16 numbers.
#include "cpu/exp2_avx512.h"
#include "cpu/simd_avx512.h"
#include "cpu/transpose_avx512.h"

#include "cpu/attention_words.h"

namespace qk::avx512 {
namespace {

// 24 sums, 4 words and a row's in 32 registers.
constexpr int kRows = 6, kVectors = 4;

QK_INLINE __m512i four_bytes(const float* p) { return _mm512_castps_si512(_mm512_set1_ps(*p)); }

// sum + the products of four unsigned bytes by four signed ones. Not the intrinsic: GCC 12 copies
// the sums around it.
QK_INLINE I32 add_products(I32 sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
}

// Keys' codes are stored unsigned, as the instruction's first operand has to be: 128 more than they
// are, which the sums start without.
struct Keys8 {
  using Sum = I32;
  static constexpr bool kScaled = true;
  static constexpr int kDepth = 4, kOffset = 128;
  static QK_INLINE Sum start(int codes) { return broadcast(-kOffset * codes); }
  static QK_INLINE Sum add(Sum sum, const float* a, I32 b) {
    return add_products(sum, b.v, four_bytes(a));
  }
  static QK_INLINE F32 number(Sum sum) { return to_float(sum); }
  static QK_INLINE void store_keys(float* row, int64_t i, I32 codes) {
    store_bytes(reinterpret_cast<uint8_t*>(row) + i, codes + broadcast(kOffset), Full{});
  }
  static QK_INLINE void store_queries(float* row, int64_t i, I32 codes) {
    store_bytes(reinterpret_cast<uint8_t*>(row) + i, codes, Full{});
  }
};

struct BFloat16Sums {
  using Sum = F32;
  static constexpr int kDepth = 2;
  static QK_INLINE Sum add(Sum sum, const float* a, I32 b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)four_bytes(a), (__m512bh)b.v)};
  }
  static QK_INLINE F32 number(Sum sum) { return sum; }
};

struct Keys16 : BFloat16Sums {
  static constexpr bool kScaled = false;
  static QK_INLINE Sum start(int) { return broadcast(0.0f); }
  static QK_INLINE void store(float* row, int64_t i, F32 x) {
    avx512::store(reinterpret_cast<BFloat16*>(row) + i, x, Full{});
  }
};

struct Values16 : BFloat16Sums {
  static constexpr float kShift = 0.0f;
  static QK_INLINE Sum zero() { return broadcast(0.0f); }
  static QK_INLINE I32 word(const F32* tokens) {
    const I32 low = bits(round_to(tokens[0], BFloat16{})),
              high = bits(round_to(tokens[1], BFloat16{}));
    return shift_right<16>(low) | high;
  }
  using Total = F32;
  static QK_INLINE Total weights(float* row, int64_t i, F32 a, F32 b, Total total) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(b.v, a.v);
    _mm512_storeu_si512(reinterpret_cast<uint16_t*>(row) + i, (__m512i)pair);
    return {_mm512_dpbf16_ps(total.v, pair, (__m512bh)_mm512_set1_epi32(0x3f803f80))};
  }
  static QK_INLINE float total(Total x) { return sum_of(x); }
};

struct Values8 {
  using Sum = I32;
  static constexpr int kDepth = 4;
  static constexpr float kShift = RoundToInteger::kShift;
  static QK_INLINE Sum zero() { return broadcast(0); }
  static QK_INLINE Sum add(Sum sum, const float* a, I32 b) {
    return add_products(sum, four_bytes(a), b.v);
  }
  static QK_INLINE F32 number(Sum sum) { return to_float(sum); }
  static QK_INLINE I32 word(const F32* tokens) {
    const I32 low = broadcast(0xff);
    return (round(tokens[0]) & low) | shift_left<8>(round(tokens[1]) & low) |
           shift_left<16>(round(tokens[2]) & low) | shift_left<24>(round(tokens[3]));
  }
  using Total = I32;
  static QK_INLINE Total weights(float* row, int64_t i, F32 a, F32 b, Total total) {
    const I32 low = round(a), high = round(b);
    store_bytes(reinterpret_cast<uint8_t*>(row) + i, low, Full{});
    store_bytes(reinterpret_cast<uint8_t*>(row) + i + kLanes, high, Full{});
    return total + (low + high);
  }
  static QK_INLINE float total(Total x) { return sum_of(to_float(x)); }
};

}  // namespace
}  // namespace qk::avx512

#include "cpu/attention.inl"
