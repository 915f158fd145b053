// Element types as the kernels see them: storage only, no code, so that any translation unit may
// include this.
#pragma once

#include <cstdint>

namespace qk {

enum class DType { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8E4M3, kFloat8E5M2 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// FP8 formats: a code is sign | exponent | mantissa. `kMinExponent` is that of the smallest normal
// number, which the subnormals share; `kNan` is the code of NaN without its sign; e4m3fn has no
// infinity, e5m2's is never produced.
struct Float8E4M3 {
  uint8_t bits;
  static constexpr int kMantissa = 3;
  static constexpr int kMinExponent = -6;
  static constexpr float kMax = 448.0f;
  static constexpr int kNan = 0x7f;
};
struct Float8E5M2 {
  uint8_t bits;
  static constexpr int kMantissa = 2;
  static constexpr int kMinExponent = -14;
  static constexpr float kMax = 57344.0f;
  static constexpr int kNan = 0x7f;
};
// FP4 e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign; no NaN. As FP8's, in the lowest three bits.
struct Float4E2M1 {
  uint8_t bits;
  static constexpr int kMantissa = 1;
  static constexpr int kMinExponent = 0;
  static constexpr float kMax = 6.0f;
  static constexpr int kNan = 0;
};

}  // namespace qk
