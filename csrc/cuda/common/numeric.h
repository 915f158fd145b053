// Scalar number formats and scale arithmetic, the same bits on host and device: no contraction, no
// fast division.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define QK_HOST_DEVICE __host__ __device__ __forceinline__

namespace qk::cuda {

QK_HOST_DEVICE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
QK_HOST_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

QK_HOST_DEVICE bool is_finite(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }

// Each operation rounds once, whatever -fmad and -prec-div say.
QK_HOST_DEVICE float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

QK_HOST_DEVICE float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// a * b + c, rounded once.
QK_HOST_DEVICE float fma_rn(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

QK_HOST_DEVICE float sub_rn(float a, float b) { return add_rn(a, -b); }

QK_HOST_DEVICE float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// Adding 1.5 * 2^23 leaves no bits for a fraction: the low bits of the sum are the value rounded
// half to even, in two's complement. For |value| < 2^22.
QK_HOST_DEVICE int32_t round_to_int(float value) {
  return static_cast<int32_t>(bits_of(add_rn(value, 12582912.0f)) - 0x4B400000u);
}

QK_HOST_DEVICE uint32_t bfloat16_from(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

QK_HOST_DEVICE uint32_t float16_from(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t bits = bits_of(value) & 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return 0x7E00u;
  if (bits >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and more round to infinity
  // Below 2^-14 the steps are 2^-24 wide, which are those of floats in [0.5, 1).
  if (bits < 0x38800000u) return sign | (bits_of(add_rn(float_of(bits), 0.5f)) - 0x3F000000u);
  return sign | ((bits - (112u << 23) + 0xFFFu + ((bits >> 13) & 1u)) >> 13);
}

QK_HOST_DEVICE float float16_value(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = (half & 0x7FFFu) << 13;
  if (magnitude >= 0x0F800000u) return float_of(sign | 0x70000000u | magnitude);  // infinity, NaN
  return float_of(sign | bits_of(mul_rn(float_of(magnitude), 5.192296858534828e33f)));  // 2^112
}

// FP8 of a float: round to nearest even, saturating, and one NaN, 0x7F, for all. `kMantissa` 3:
// e4m3fn, 2: e5m2.
template <int kMantissa>
QK_HOST_DEVICE uint32_t float8_from(float value) {
  constexpr uint32_t kBias = kMantissa == 3 ? 7 : 15;
  constexpr uint32_t kLargest = kMantissa == 3 ? 0x7Eu : 0x7Bu;  // 448, 57344
  constexpr uint32_t kDropped = 23 - kMantissa;
  constexpr uint32_t kSmallestNormal = (127 + 1 - kBias) << 23;
  // The float whose last bit weighs as much as a subnormal's: adding it rounds to whole subnormal
  // steps.
  constexpr uint32_t kStep = (127 + 1 - kBias + kDropped) << 23;
  const uint32_t sign = (bits_of(value) >> 24) & 0x80u;
  const uint32_t bits = bits_of(value) & 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return 0x7Fu;
  uint32_t code;
  if (bits < kSmallestNormal) {
    code = bits_of(add_rn(float_of(bits), float_of(kStep))) - kStep;
  } else {
    code =
        (bits - ((127 - kBias) << 23) + (1u << (kDropped - 1)) - 1u + ((bits >> kDropped) & 1u)) >>
        kDropped;
  }
  return sign | (code < kLargest ? code : kLargest);
}

QK_HOST_DEVICE float float8_e4m3_value(uint32_t code) {
  const uint32_t sign = (code & 0x80u) << 24;
  if ((code & 0x7Fu) == 0x7Fu) return float_of(0x7FC00000u);
  // Read as a float whose exponent is 120 too small; subnormals come out right as well.
  return float_of(sign | bits_of(mul_rn(float_of((code & 0x7Fu) << 20), 1.329227995784916e36f)));
}

// e5m2 is the upper half of a float16.
QK_HOST_DEVICE float float8_e5m2_value(uint32_t code) { return float16_value((code & 0xFFu) << 8); }

}  // namespace qk::cuda
