// The kernels of attention.h for AVX2: int8 codes as pairs of int16, whose products vpmaddwd sums
// exactly; 16-bit values in fp32.
#include "cpu/simd_avx2.h"

#include "cpu/attention_words.h"

namespace qk::avx2 {
namespace {

// 12 registers of sums, two of words, one of a row's.
constexpr int kRows = 6, kVectors = 1;

struct PairSums {
  using Sum = I32;
  static constexpr int kDepth = 2;
  static QK_INLINE Sum add(Sum sum, const float* a, I32 b) {
    const __m256i pair = _mm256_castps_si256(_mm256_broadcast_ss(a));
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(pair, b.a)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(pair, b.b))};
  }
  static QK_INLINE F32 number(Sum sum) { return to_float(sum); }
  static QK_INLINE void store_shorts(float* row, int64_t i, I32 codes) {
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes.a, codes.b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<int16_t*>(row) + i), shorts);
  }
};

struct Keys8 : PairSums {
  static constexpr bool kScaled = true;
  static constexpr int kOffset = 0;
  static QK_INLINE Sum start(int) { return broadcast(0); }
  static QK_INLINE void store_keys(float* row, int64_t i, I32 codes) {
    store_shorts(row, i, codes);
  }
  static QK_INLINE void store_queries(float* row, int64_t i, I32 codes) {
    store_shorts(row, i, codes);
  }
};

using Keys16 = FloatKeys16;
using Values16 = FloatValues<RoundToBFloat16>;

struct Values8 : PairSums {
  static constexpr float kShift = RoundToInteger::kShift;
  static QK_INLINE Sum zero() { return broadcast(0); }
  static QK_INLINE I32 word(const F32* tokens) {
    return (round(tokens[0]) & broadcast(0xffff)) | shift_left<16>(round(tokens[1]));
  }
  using Total = I32;
  static QK_INLINE Total weights(float* row, int64_t i, F32 a, F32 b, Total total) {
    const I32 low = round(a), high = round(b);
    store_shorts(row, i, low);
    store_shorts(row, i + kLanes, high);
    return total + (low + high);
  }
  static QK_INLINE float total(Total x) { return sum_of(to_float(x)); }
};

}  // namespace
}  // namespace qk::avx2

#include "cpu/attention.inl"
