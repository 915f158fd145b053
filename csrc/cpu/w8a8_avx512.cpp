// The kernels of w8a8.h for AVX-512 VNNI: one instruction for four codes of 16 columns.
#include "cpu/simd_avx512.h"

namespace qk::avx512 {
namespace {

// 24 sums, 4 vectors of weights and one of codes in 32 registers.
constexpr int kRows = 6, kVectors = 4;

struct Weights {
  __m512i v;
};
struct Codes {
  __m512i v;
};
QK_INLINE Weights load_weights(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
QK_INLINE Codes load_codes(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return {_mm512_set1_epi32(word)};
}
QK_INLINE I32 dot(I32 sum, Codes a, Weights w) { return {_mm512_dpbusd_epi32(sum.v, a.v, w.v)}; }
QK_INLINE I32 multiply_low(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }

}  // namespace
}  // namespace qk::avx512

#include "cpu/w8a8.inl"
