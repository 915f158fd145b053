// 16 fp32 lanes in standard C++ plus the vector extensions of GCC and Clang, for any CPU. What the
// names mean: simd_avx512.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/types.h"

#define QK_ISA portable
#define QK_INLINE inline __attribute__((always_inline))

// Vectors wider than the baseline's registers are passed between functions of one translation unit
// only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace qk::portable {

constexpr int kLanes = 16;

typedef float FloatVec __attribute__((vector_size(64), aligned(16)));
typedef int32_t IntVec __attribute__((vector_size(64), aligned(16)));
typedef uint32_t UintVec __attribute__((vector_size(64), aligned(16)));
typedef uint16_t UshortVec __attribute__((vector_size(32), aligned(16)));
typedef int8_t ByteVec __attribute__((vector_size(16)));
typedef double DoubleVec __attribute__((vector_size(128), aligned(16)));

struct F32 {
  FloatVec v;
};
struct I32 {
  IntVec v;
};
using Mask = I32;
struct Two {
  F32 a, b;
};

struct Full {};
struct Part {
  explicit Part(int64_t n) : count(static_cast<int>(n)) {}
  int count;
};

QK_INLINE F32 broadcast(float x) { return {x - FloatVec{}}; }
QK_INLINE I32 broadcast(int x) { return {x - IntVec{}}; }

QK_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
QK_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
QK_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
QK_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
QK_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
// Loops, which become vector code: GCC 12 takes a comparison of vectors wider than a register
// apart.
QK_INLINE F32 min(F32 a, F32 b) {
  for (int i = 0; i < kLanes; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}
QK_INLINE F32 max(F32 a, F32 b) {
  for (int i = 0; i < kLanes; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}

QK_INLINE I32 operator+(I32 a, I32 b) { return {(IntVec)((UintVec)a.v + (UintVec)b.v)}; }
QK_INLINE I32 operator-(I32 a, I32 b) { return {(IntVec)((UintVec)a.v - (UintVec)b.v)}; }
QK_INLINE I32 operator&(I32 a, I32 b) { return {a.v & b.v}; }
QK_INLINE I32 operator|(I32 a, I32 b) { return {a.v | b.v}; }
QK_INLINE I32 min(I32 a, I32 b) { return {a.v < b.v ? a.v : b.v}; }
QK_INLINE I32 max(I32 a, I32 b) { return {a.v > b.v ? a.v : b.v}; }
template <int kBits>
QK_INLINE I32 shift_left(I32 a) {
  return {(IntVec)((UintVec)a.v << kBits)};
}
template <int kBits>
QK_INLINE I32 shift_right(I32 a) {
  return {(IntVec)((UintVec)a.v >> kBits)};
}

QK_INLINE I32 bits(F32 a) { return {(IntVec)a.v}; }
QK_INLINE F32 from_bits(I32 a) { return {(FloatVec)a.v}; }
QK_INLINE Mask is_nan(F32 a) {
  const IntVec magnitude = (IntVec)a.v & 0x7fffffff;
  return {(0x7f800000 - magnitude) >> 31};
}
QK_INLINE Mask equal(I32 a, I32 b) { return {a.v == b.v}; }
QK_INLINE I32 select(Mask m, I32 yes, I32 no) { return {(yes.v & m.v) | (no.v & ~m.v)}; }
// 1.5 * 2^23 + x has the nearest integer to x in its low mantissa bits: the addition does the
// rounding.
QK_INLINE I32 round(F32 a) {
  const F32 magic = broadcast(12582912.0f);
  return select(is_nan(a), broadcast(0), bits(a + magic) - bits(magic));
}
QK_INLINE I32 truncate(F32 a) { return {__builtin_convertvector(a.v, IntVec)}; }
QK_INLINE F32 to_float(I32 a) { return {__builtin_convertvector(a.v, FloatVec)}; }

// ---- fp16 in integer arithmetic; subnormals never become fp32 subnormals, which a flush-to-zero
// mode would lose ----
QK_INLINE F32 widen(I32 x, Half) {
  const I32 magnitude = shift_left<13>(x & broadcast(0x7fff));
  const I32 exponent = magnitude & broadcast(0x0f800000);
  const I32 special = equal(exponent, broadcast(0x0f800000)) & broadcast(112 << 23);
  const I32 normal = magnitude + broadcast(112 << 23) + special;
  const F32 least = broadcast(0x1p-14f);
  const I32 subnormal = bits(from_bits(magnitude + bits(least)) - least);
  return from_bits(select(equal(exponent, broadcast(0)), subnormal, normal) |
                   shift_left<16>(x & broadcast(0x8000)));
}
QK_INLINE I32 narrow(F32 x, Half) {
  const F32 magnitude = from_bits(bits(x) & broadcast(0x7fffffff));
  const F32 finite = min(broadcast(65536.0f), magnitude);
  const I32 exponent = max(bits(finite) & broadcast(0x7f800000), broadcast(113 << 23));
  const I32 magic =
      exponent + broadcast(13 << 23);  // its unit in the last place is that of the fp16 result
  const I32 rounded =
      bits(finite + from_bits(magic)) - magic + shift_right<13>(exponent - broadcast(113 << 23));
  return select(is_nan(x), broadcast(0x7e00), rounded) |
         (shift_right<16>(bits(x)) & broadcast(0x8000));
}
QK_INLINE F32 widen(I32 x, BFloat16) { return from_bits(shift_left<16>(x)); }
QK_INLINE I32 narrow(F32 x, BFloat16) {
  const I32 b = bits(x);
  const I32 rounded = shift_right<16>(b + (shift_right<16>(b) & broadcast(1)) + broadcast(0x7fff));
  return select(is_nan(x), broadcast(0x7fc0), rounded);
}

// ---- loads and stores ----
QK_INLINE F32 load(const float* p, Full) {
  F32 x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}
template <class T>
QK_INLINE F32 load(const T* p, Full) {
  UshortVec x;
  std::memcpy(&x, p, sizeof(x));
  return widen({__builtin_convertvector(x, IntVec)}, T{});
}
QK_INLINE void store(float* p, F32 x, Full) { std::memcpy(p, &x.v, sizeof(x.v)); }
template <class T>
QK_INLINE void store(T* p, F32 x, Full) {
  const UshortVec y = __builtin_convertvector(narrow(x, T{}).v, UshortVec);
  std::memcpy(p, &y, sizeof(y));
}
QK_INLINE I32 load_signed(const void* p, Full) {
  ByteVec x;
  std::memcpy(&x, p, sizeof(x));
  return {__builtin_convertvector(x, IntVec)};
}
QK_INLINE void store_bytes(void* p, I32 x, Full) {
  const ByteVec y = __builtin_convertvector(x.v, ByteVec);
  std::memcpy(p, &y, sizeof(y));
}

QK_INLINE float to_float(float x) { return x; }
QK_INLINE float to_float(Half x) { return widen(broadcast(static_cast<int>(x.bits)), x).v[0]; }

// ---- order-preserving integer keys ----
template <class Int>
struct KeysOf {
  using Scalar = Int;
  typedef Int Vec __attribute__((vector_size(32)));
  static constexpr int kSign = 8 * sizeof(Int) - 1;
  static constexpr int kCount = sizeof(Vec) / sizeof(Scalar);
  static constexpr Scalar kMagnitude = static_cast<Scalar>((1u << kSign) - 1);
  static QK_INLINE Vec load(const void* p) {
    Vec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static QK_INLINE void store(Scalar* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
  static QK_INLINE Vec broadcast(Scalar x) { return x - Vec{}; }
  static QK_INLINE Vec abs(Vec x) { return x & kMagnitude; }
  static QK_INLINE Vec order(Vec x) { return x ^ ((x >> kSign) & kMagnitude); }
  static QK_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static QK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static QK_INLINE int reduce_max(Vec x) {
    Scalar result = x[0];
    for (int i = 1; i < kCount; ++i) result = x[i] > result ? x[i] : result;
    return result;
  }
  static QK_INLINE int reduce_min(Vec x) {
    Scalar result = x[0];
    for (int i = 1; i < kCount; ++i) result = x[i] < result ? x[i] : result;
    return result;
  }
};
template <class T>
struct Keys : KeysOf<int16_t> {};  // Half, BFloat16
template <>
struct Keys<float> : KeysOf<int32_t> {};

// ---- fp64 sums ----
struct F64 {
  DoubleVec v;
};
QK_INLINE F64 zero_sums() { return {DoubleVec{}}; }
QK_INLINE F64 add_square(F64 acc, F32 x) {
  const DoubleVec wide = __builtin_convertvector(x.v, DoubleVec);
  return {acc.v + wide * wide};
}
QK_INLINE void store(double* p, F64 x) { std::memcpy(p, &x.v, sizeof(x.v)); }

// ---- nibbles: see simd_avx512.h. Eight codes in a 64-bit word (little-endian), squeezed in three
// steps ----
constexpr int kNibbleCodes = 8;
QK_INLINE void pack_nibbles(const int8_t* codes, uint8_t* out) {
  uint64_t u;
  std::memcpy(&u, codes, sizeof(u));
  u = (u ^ 0x0808080808080808) & 0x0f0f0f0f0f0f0f0f;
  u = (u | u >> 4) & 0x00ff00ff00ff00ff;
  u = (u | u >> 8) & 0x0000ffff0000ffff;
  const uint32_t word = static_cast<uint32_t>(u | u >> 16);
  std::memcpy(out, &word, sizeof(word));
}
QK_INLINE void unpack_nibbles(const uint8_t* in, int8_t* codes) {
  uint32_t word;
  std::memcpy(&word, in, sizeof(word));
  uint64_t u = word;
  u = (u | u << 16) & 0x0000ffff0000ffff;
  u = (u | u << 8) & 0x00ff00ff00ff00ff;
  u = (u | u << 4) & 0x0f0f0f0f0f0f0f0f;
  // u - 8 in each byte: u ^ 8 is u + 8 modulo 16; its bit 3 is the sign, to be spread over bits 4
  // to 7.
  u ^= 0x0808080808080808;
  u |= (u & 0x0808080808080808) * 0x1e;
  std::memcpy(codes, &u, sizeof(u));
}

#include "cpu/simd_partial.inl"

}  // namespace qk::portable
