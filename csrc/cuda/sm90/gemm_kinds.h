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
constexpr int kGroupRows = 64;  // channels of a warp group: a panel
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

struct KindInt8 {
  using Weight = WeightInt8;
  using Product = Int8;
  static constexpr int kStageRows = 32;  // word rows
  static constexpr int kDepth = 128;     // columns of a stage
  static constexpr bool kPromotes = false;

  __device__ static Left left(const StageWords& words, int step, const Offset (&)[2]) {
    const int row = step * 8 + static_cast<int>(threadIdx.x) % 4;
    const Words2 first = words(row), second = words(row + 4);
    return {{first.w[0], first.w[1], second.w[0], second.w[1]}};
  }
};

}  // namespace qk::cuda::sm90
