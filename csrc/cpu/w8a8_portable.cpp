// The kernels of w8a8.h for any CPU. Products of an unsigned and a signed byte fit 16 bits, sums of
// two do not.
#include "cpu/simd_portable.h"

namespace qk::portable {
namespace {

// The baseline may have no more than 16 registers of four lanes.
constexpr int kRows = 2, kVectors = 1;

typedef int16_t ShortVec __attribute__((vector_size(64), aligned(16)));

struct Weights {
  ShortVec even, odd;
};
struct Codes {
  ShortVec even, odd;
};
QK_INLINE Weights load_weights(const int8_t* p) {
  ShortVec x;
  std::memcpy(&x, p, sizeof(x));
  return {(ShortVec)(x << 8) >> 8, x >> 8};
}
QK_INLINE Codes load_codes(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return {(ShortVec)broadcast(word & 0x00ff00ff).v, (ShortVec)broadcast(word >> 8 & 0x00ff00ff).v};
}
QK_INLINE I32 dot(I32 sum, Codes a, Weights w) {
  const IntVec even = (IntVec)(a.even * w.even), odd = (IntVec)(a.odd * w.odd);
  const UintVec low = (UintVec)((IntVec)((UintVec)even << 16) >> 16) + (UintVec)(even >> 16);
  const UintVec high = (UintVec)((IntVec)((UintVec)odd << 16) >> 16) + (UintVec)(odd >> 16);
  return {(IntVec)((UintVec)sum.v + low + high)};
}
QK_INLINE I32 multiply_low(I32 a, I32 b) { return {(IntVec)((UintVec)a.v * (UintVec)b.v)}; }

}  // namespace
}  // namespace qk::portable

#include "cpu/w8a8.inl"
