// Kinds of packed weight as the left side of wgmma: how a thread makes its registers of their
// words.
//
// A stage is 128 bytes of each row of activations: 128 codes or 64 numbers of 16 bits, four
// products of 32 bytes, step 0 to 3. Row r of a warp's 16 is channel 2 r for r < 8, else 2 (r - 8)
// + 1: a thread has two neighbouring channels, whose words of one word row are one load.
// Activations lie in shared memory as they are, so k has its own order here, and a thread takes the
// words that this asks for.
#pragma once

#include "cuda/common/gemm_weights.h"
#include "cuda/sm90/wgmma.h"

namespace qk::cuda::sm90 {

constexpr int kStageBytes = kTileRowBytes;
constexpr int kSteps = kStageBytes / 32;
constexpr int kWordRowBytes = 4 * kPanel;

// A stage's words of a panel, [word rows][2][128 bytes], as copy_tile swizzles them. Word rows of
// the four threads of a channel lie at different banks.
class StageWords {
 public:
  __device__ explicit StageWords(const unsigned char* panel) : panel(panel) {}

  // Of the thread's two channels.
  __device__ Words2 operator()(int word_row) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4, row = lane / 4;
    const auto place = static_cast<uint32_t>(word_row * kWordRowBytes + warp * 64 + row * 8);
    return load_vector<Words2>(panel + swizzled(place));
  }

 private:
  const unsigned char* panel;
};

// kTotals: sums, of segments of K, are added to others in fp32; kEveryStage: and after every stage.
// kIntGroups: as ops/w4a8.py says for sums of int8 by int4.
struct KindInt8 {
  using Weight = WeightInt8;
  using Product = Int8;
  static constexpr int kStageRows = 32;  // word rows
  static constexpr int kDepth = 128;     // columns of a stage
  static constexpr bool kTotals = false, kIntGroups = false, kEveryStage = false;

  __device__ static Left left(const StageWords& words, int step, const Offset (&)[2]) {
    const int row = step * 8 + static_cast<int>(threadIdx.x) % 4;
    const Words2 first = words(row), second = words(row + 4);
    return {{first.w[0], first.w[1], second.w[0], second.w[1]}};
  }
};

// Codes less 8, times 16, as in WeightInt4ByInt8. A word is two times four codes.
struct KindInt4ByInt8 {
  using Weight = WeightInt4ByInt8;
  using Product = Int8;
  static constexpr int kStageRows = 16, kDepth = 128;
  static constexpr bool kTotals = true, kIntGroups = true, kEveryStage = false;

  __device__ static Left left(const StageWords& words, int step, const Offset (&)[2]) {
    const int quarter = static_cast<int>(threadIdx.x) % 4;
    const int row = step * 4 + quarter / 2, shift = quarter % 2 == 0 ? 4 : 0;
    const Words2 first = words(row), second = words(row + 2);
    const auto codes = [&](uint32_t word) {
      return logic3<(0xF0 & 0xCC) ^ 0xAA>(word << shift, 0xF0F0F0F0u, 0x80808080u);
    };
    return {{codes(first.w[0]), codes(first.w[1]), codes(second.w[0]), codes(second.w[1])}};
  }
};

// e4m3 on both sides. Codes of a word are k = 0, 2, 1, 3.
struct KindFloat8 {
  using Weight = WeightFloat8<Float16>;
  using Product = Float8E4M3;
  static constexpr int kStageRows = 32, kDepth = 128;
  static constexpr bool kTotals = true, kIntGroups = false;
  static constexpr bool kEveryStage = true;
  static constexpr float kFactor = 1.0f;

  __device__ static Left left(const StageWords& words, int step, const Offset (&)[2]) {
    const int row = step * 8 + static_cast<int>(threadIdx.x) % 4;
    const Words2 first = words(row), second = words(row + 4);
    const auto in_order = [](uint32_t word) { return permute_bytes(word, 0, 0x3120); };
    return {
        {in_order(first.w[0]), in_order(first.w[1]), in_order(second.w[0]), in_order(second.w[1])}};
  }
};

// Two neighbouring numbers of a word, pair `which` of it, as `decode` makes them in gemm_weights.h.
__device__ inline uint32_t pair_of(WeightInt4<BFloat16>, uint32_t word, int which, Offset offset) {
  return fma_bfloat16x2(set_codes(word >> (4 * which), 0x000F000Fu, 0x43004300u), kOnesBFloat16,
                        offset.w);
}
__device__ inline uint32_t pair_of(WeightInt4<Float16>, uint32_t word, int which, Offset offset) {
  return fma_float16x2(set_codes(word >> (4 * which), 0x000F000Fu, 0x64006400u), kOnesFloat16,
                       permute_bytes(offset.w, 0, 0x1010));
}

template <typename Element>
__device__ uint32_t pair_of(WeightByte<Element>, uint32_t word, int which, Offset offset) {
  if constexpr (__is_same(Element, BFloat16)) {
    const float one = float_of(permute_bytes(word, 0x4B000000u, 0x7650u | which));
    const float two = float_of(permute_bytes(word, 0x4B000000u, 0x7650u | (which + 2)));
    return permute_bytes(bits_of(add_rn(one, float_of(offset.w))),
                         bits_of(add_rn(two, float_of(offset.w))), 0x7632);
  } else {
    return fma_float16x2(permute_bytes(word, 0x64646464u, 0x4240u | which * 0x0101u), kOnesFloat16,
                         offset.w);
  }
}
template <typename Element>
__device__ uint32_t pair_of(WeightFloat8<Element>, uint32_t word, int which, Offset) {
  const uint32_t pair = word >> (8 * which);
  const uint32_t sign = pair << 8 & 0x80008000u;
  if constexpr (__is_same(Element, BFloat16)) {
    return fma_bfloat16x2(set_codes(pair << 4, 0x07F007F0u, sign), 0x7B807B80u, 0x80008000u);
  } else {
    return set_codes(pair << 7, 0x3F803F80u, sign);
  }
}
__device__ inline uint32_t pair_of(WeightBFloat16, uint32_t word, int, Offset) { return word; }

// By numbers of 16 bits.
template <typename Weight_>
struct KindSixteen {
  using Weight = Weight_;
  using Product = typename Weight::Element;
  static constexpr int kStageRows = 8 * Weight::kWords, kDepth = 64;
  static constexpr bool kTotals = true, kIntGroups = false, kEveryStage = false;
  static constexpr float kFactor = Weight::kFactor;

  __device__ static Left left(const StageWords& words, int step, const Offset (&offset)[2]) {
    // Of 8 numbers, the thread has pair lane % 4, of word row `row` and of the first one after
    // them.
    constexpr int kPairs = 4 / Weight::kWords;  // of a word
    const int pair = static_cast<int>(threadIdx.x) % 4;
    const int row = step * 2 * Weight::kWords + pair / kPairs, which = pair % kPairs;
    const Words2 first = words(row), second = words(row + Weight::kWords);
    return {{pair_of(Weight{}, first.w[0], which, offset[0]),
             pair_of(Weight{}, first.w[1], which, offset[1]),
             pair_of(Weight{}, second.w[0], which, offset[0]),
             pair_of(Weight{}, second.w[1], which, offset[1])}};
  }
};

}  // namespace qk::cuda::sm90
