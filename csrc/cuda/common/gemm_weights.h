// Kinds of packed weight, and how a thread makes matrix operands of their words.
//
// A unit is 64 bytes of each row of activations: 32 numbers of 16 bits or 64 codes. Of a unit, the
// four threads of a row in mma's layout take 16 bytes each, thread p those from 16 p on, and of
// every channel the kWords words with the same k, from word row 4 p on. `decode` makes four
// registers of them that match the activations' four: 0 and 1 for the first product, 2 and 3 for
// the second. Which k a product calls its own does not matter as long as both sides agree, so no
// number ever changes its thread. A short unit is half as long: one product of 8 bytes a thread.
#pragma once

#include "cuda/common/chunk.h"
#include "cuda/common/gemm.h"
#include "cuda/common/mma.h"

namespace qk::cuda {

template <typename Weight>
constexpr int kUnitBytes = 64;

// How sums become results: as they are, by scales of rows and channels, by those of groups along K.
enum class Scaling { kNone, kRows, kGroups, kIntGroups };

// `value` is a code of a word, of kPerWord, less half its range: for the kernel of odd groups.
//
// What decode takes off the codes of a channel in a group, as each kind needs it.
struct Offset {
  uint32_t w;
};

struct WeightInt8 {
  static constexpr int kWords = 4, kUnit = 64;
  static constexpr Scaling kScaling = Scaling::kRows;
  using Part = IntSums;

  __device__ static Offset offset(int) { return {0}; }
  __device__ static void decode(const uint32_t (&words)[4], Offset, uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = words[i];
  }
};

// Codes less 8, times 16: the sums are divided by that, which is exact.
struct WeightInt4ByInt8 {
  static constexpr int kWords = 2, kUnit = 64;
  static constexpr Scaling kScaling = Scaling::kIntGroups;
  using Part = IntSums;

  __device__ static Offset offset(int) { return {0}; }
  __device__ static void decode(const uint32_t (&words)[2], Offset, uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[2 * i] = logic3<(0xF0 & 0xCC) ^ 0xAA>(words[i] << 4, 0xF0F0F0F0u, 0x80808080u);
      b[2 * i + 1] = logic3<(0xF0 & 0xCC) ^ 0xAA>(words[i], 0xF0F0F0F0u, 0x80808080u);
    }
  }

  static constexpr int kPerWord = 8;
  __device__ static int value(uint32_t word, int k) {
    return static_cast<int>(word >> (k % 4 * 8 + k / 4 * 4) & 15u) - 8;
  }
};

// The same words in short units, for groups of 32 columns and the odd multiples of that.
struct WeightInt4ByInt8Short : WeightInt4ByInt8 {
  static constexpr int kWords = 1, kUnit = 32;

  __device__ static void decode(const uint32_t (&words)[1], Offset, uint32_t (&b)[2]) {
    b[0] = logic3<(0xF0 & 0xCC) ^ 0xAA>(words[0] << 4, 0xF0F0F0F0u, 0x80808080u);
    b[1] = logic3<(0xF0 & 0xCC) ^ 0xAA>(words[0], 0xF0F0F0F0u, 0x80808080u);
  }
};
template <>
constexpr int kUnitBytes<WeightInt4ByInt8Short> = 32;

constexpr uint32_t kOnesBFloat16 = 0x3F803F80u, kOnesFloat16 = 0x3C003C00u;

// (codes & mask) | bits: numbers whose last places are the codes.
__device__ inline uint32_t set_codes(uint32_t codes, uint32_t mask, uint32_t bits) {
  return logic3<(0xF0 & 0xCC) | 0xAA>(codes, mask, bits);
}

// Eight unsigned codes of 4 bits in a word, pairs 4 bits apart: 128 + code in bf16, 1024 + code or
// 1024 + 16 code in fp16.
template <typename Element_>
struct WeightInt4 {
  using Element = Element_;
  static constexpr int kWords = 1, kUnit = 32;
  static constexpr Scaling kScaling = Scaling::kGroups;
  static constexpr float kFactor = 1.0f;
  static constexpr bool kNanRow = false, kInputScales = false;
  using Part = Sums;

  __device__ static Offset offset(int zero_point) {
    if constexpr (__is_same(Element, BFloat16)) {
      const float minus = -static_cast<float>(128 + 8 + zero_point);
      return {narrow_bfloat16x2(minus, minus)};
    } else {
      const float zero = static_cast<float>(8 + zero_point);
      return {narrow_float16x2(-(1024.0f + zero), -(64.0f + zero))};
    }
  }

  __device__ static void decode(const uint32_t (&words)[1], Offset offset, uint32_t (&b)[4]) {
    const uint32_t word = words[0];
    if constexpr (__is_same(Element, BFloat16)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[i] = fma_bfloat16x2(set_codes(word >> (4 * i), 0x000F000Fu, 0x43004300u), kOnesBFloat16,
                              offset.w);
      }
    } else {
      const uint32_t low = permute_bytes(offset.w, 0, 0x1010);
      const uint32_t high = permute_bytes(offset.w, 0, 0x3232);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pairs = word >> (8 * i);
        b[2 * i] = fma_float16x2(set_codes(pairs, 0x000F000Fu, 0x64006400u), kOnesFloat16, low);
        b[2 * i + 1] = fma_float16x2(set_codes(pairs, 0x00F000F0u, 0x64006400u), 0x2C002C00u, high);
      }
    }
  }

  static constexpr int kPerWord = 8;
  __device__ static float value(uint32_t word, int k) {
    return static_cast<float>(static_cast<int>(word >> (k % 2 * 16 + k / 2 * 4) & 15u) - 8);
  }
};

// Four unsigned codes of 8 bits in a word: k = 0, 2, 1, 3 from its lowest byte up.
template <typename Element_>
struct WeightByte {
  using Element = Element_;
  static constexpr int kWords = 2, kUnit = 32;
  static constexpr Scaling kScaling = Scaling::kGroups;
  static constexpr float kFactor = 1.0f;
  static constexpr bool kNanRow = false, kInputScales = false;
  using Part = Sums;

  __device__ static Offset offset(int zero_point) {
    if constexpr (__is_same(Element, BFloat16)) {
      return {bits_of(-static_cast<float>((1 << 23) + 128 + zero_point))};
    } else {
      const float minus = -static_cast<float>(1024 + 128 + zero_point);
      return {narrow_float16x2(minus, minus)};
    }
  }

  __device__ static void decode(const uint32_t (&words)[2], Offset offset, uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[i / 2];
      const int first = i % 2;  // byte of the pair's lower half
      if constexpr (__is_same(Element, BFloat16)) {
        // 2^23 + code as fp32; the differences are whole and short, their upper halves all of them.
        const uint32_t one = permute_bytes(word, 0x4B000000u, 0x7650u | first);
        const uint32_t two = permute_bytes(word, 0x4B000000u, 0x7650u | (first + 2));
        b[i] = permute_bytes(bits_of(add_rn(float_of(one), float_of(offset.w))),
                             bits_of(add_rn(float_of(two), float_of(offset.w))), 0x7632);
      } else {
        b[i] = fma_float16x2(permute_bytes(word, 0x64646464u, 0x4240u | first * 0x0101u),
                             kOnesFloat16, offset.w);
      }
    }
  }

  static constexpr int kPerWord = 4;
  __device__ static float value(uint32_t word, int k) {
    return static_cast<float>(static_cast<int>(word >> (k % 2 * 16 + k / 2 * 8) & 255u) - 128);
  }
};

// Four e4m3fn codes in a word, in the order of WeightByte. A NaN reads as 480: results of a channel
// that has one are made NaN at the end.
template <typename Element_>
struct WeightFloat8 {
  using Element = Element_;
  static constexpr int kWords = 2, kUnit = 32;
  static constexpr Scaling kScaling = Scaling::kGroups;
  // fp16 with the exponent of e4m3 are numbers 2^8 too small: so are the sums.
  static constexpr float kFactor = __is_same(Element_, BFloat16) ? 1.0f : 256.0f;
  static constexpr bool kNanRow = true;  // a last word row: NaN for the channels that have one
  static constexpr bool kInputScales = true;
  using Part = Sums;

  __device__ static Offset offset(int) { return {0}; }

  __device__ static void decode(const uint32_t (&words)[2], Offset, uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = words[i / 2] >> (i % 2 * 8);
      const uint32_t sign = pair << 8 & 0x80008000u;
      if constexpr (__is_same(Element, BFloat16)) {
        // Times 2^120.
        b[i] = fma_bfloat16x2(set_codes(pair << 4, 0x07F007F0u, sign), 0x7B807B80u, 0x80008000u);
      } else {
        b[i] = set_codes(pair << 7, 0x3F803F80u, sign);
      }
    }
  }

  static constexpr int kPerWord = 4;
  __device__ static float value(uint32_t word, int k) {
    return float8_e4m3_value(word >> (k % 2 * 16 + k / 2 * 8) & 255u);
  }
};

// e4m3fn codes by e4m3fn codes, as from sm_89 on. The tensor cores of some devices keep but 14 bits
// of a sum, so that groups have to be short: 128 columns.
struct WeightFloat8Codes {
  using Element = Float8E4M3;
  static constexpr int kWords = 4, kUnit = 64;
  static constexpr Scaling kScaling = Scaling::kGroups;
  static constexpr float kFactor = 1.0f;
  static constexpr bool kNanRow = true, kInputScales = true;
  using Part = Sums;

  __device__ static Offset offset(int) { return {0}; }
  __device__ static void decode(const uint32_t (&words)[4], Offset, uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = permute_bytes(words[i], 0, 0x3120);
  }
};

// Pairs of bf16.
struct WeightBFloat16 {
  using Element = BFloat16;
  static constexpr int kWords = 4, kUnit = 32;
  static constexpr Scaling kScaling = Scaling::kNone;
  static constexpr float kFactor = 1.0f;
  static constexpr bool kNanRow = false, kInputScales = false;
  using Part = Sums;

  __device__ static Offset offset(int) { return {0}; }
  __device__ static void decode(const uint32_t (&words)[4], Offset, uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = words[i];
  }
};

}  // namespace qk::cuda
