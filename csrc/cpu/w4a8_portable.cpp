// The kernels of w4a8.h for any CPU: products in 16 bits, the even and the odd codes apart.
#include "cpu/simd_portable.h"

namespace qk::portable {
namespace {

// The baseline may have no more than 16 registers of 8 such lanes.
constexpr int kTileRows = 2;
constexpr bool kOwnStream = false;

typedef int16_t ShortVec __attribute__((vector_size(64), aligned(16)));

struct Narrow {
  ShortVec v;
};
struct Nibbles {
  ShortVec even, odd;
};
struct FourCodes {
  ShortVec even, odd;
};
QK_INLINE Narrow zero_narrow() { return {ShortVec{}}; }
template <bool kHigh>
QK_INLINE Nibbles load_nibbles(const uint32_t* p) {
  UintVec x;
  std::memcpy(&x, p, sizeof(x));
  constexpr int kShift = kHigh ? 4 : 0;
  return {(ShortVec)((x >> kShift) & 0x000f000f), (ShortVec)((x >> (8 + kShift)) & 0x000f000f)};
}
// Two codes, to meet the two halves of a word.
QK_INLINE ShortVec pair(int low, int high) {
  return (ShortVec)(((low & 0xffff) | static_cast<int>(static_cast<unsigned>(high) << 16)) -
                    IntVec{});
}
QK_INLINE FourCodes load_codes(const int8_t* p) { return {pair(p[0], p[2]), pair(p[1], p[3])}; }
QK_INLINE Narrow add_products(Narrow sum, Nibbles weights, FourCodes codes) {
  return {sum.v + weights.even * codes.even + weights.odd * codes.odd};
}
QK_INLINE I32 widen(Narrow x) {
  const IntVec both = (IntVec)x.v;
  return {((both << 16) >> 16) + (both >> 16)};
}
QK_INLINE I32 multiply_low(I32 a, I32 b) { return {a.v * b.v}; }

}  // namespace
}  // namespace qk::portable

#include "cpu/w4a8.inl"
#include "cpu/w4a8_narrow.inl"
