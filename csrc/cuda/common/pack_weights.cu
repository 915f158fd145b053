// A block turns tiles of 64 channels by 32 words round in shared memory, so that it reads along K
// and writes along the channels. Sums and NaN of whole channels are a second pass, a warp for each.
// It is done once for a layer; its speed is that of the memory.
#include "cuda/common/pack_weights.h"

#include "cuda/common/chunk.h"

namespace qk::cuda {
namespace {

constexpr int kPanel = 64;
constexpr int kTileWords = 32;

struct Tile {
  uint32_t words[kPanel]
                [kTileWords + 1];  // one more: lanes that read a column differ in their bank
};

// Four bytes from k on, zeros beyond K.
__device__ uint32_t four_bytes(const WeightSource& source, int row, int64_t k) {
  const uint8_t* from = static_cast<const uint8_t*>(source.data) + row * source.stride + k;
  const int64_t n = source.cols - k;
  if (n >= 4 && aligned_to(from, 4)) return load_vector<uint32_t>(from);
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    if (i < n) word |= static_cast<uint32_t>(from[i]) << (8 * i);
  }
  return word;
}

struct Int8Words {
  static constexpr int kCodes = 4;
  static __device__ uint32_t word(const WeightSource& source, int row, int w) {
    return four_bytes(source, row, int64_t{w} * 4);
  }
};

struct Float8Words {
  static constexpr int kCodes = 4;
  static __device__ uint32_t word(const WeightSource& source, int row, int w) {
    const uint32_t four = four_bytes(source, row, int64_t{w} * 4);
    return permute_bytes(four, 0, 0x3120);
  }
};

struct Int4ByInt8Words {
  static constexpr int kCodes = 8;
  static __device__ uint32_t word(const WeightSource& source, int row, int w) {
    const uint32_t given = static_cast<const uint32_t*>(source.data)[row * source.stride + w];
    return spread(given & 0xFFFFu) | spread(given >> 16) << 4;
  }
  // Four nibbles, one to a byte.
  static __device__ uint32_t spread(uint32_t half) {
    half = (half | half << 8) & 0x00FF00FFu;
    return (half | half << 4) & 0x0F0F0F0Fu;
  }
};

template <int kBits>
struct UnsignedWords {
  static constexpr int kCodes = 32 / kBits;
  static __device__ uint32_t word(const WeightSource& source, int row, int w) {
    const uint32_t* from = static_cast<const uint32_t*>(source.data) + row * source.stride;
    const uint32_t given = source.perm == nullptr ? from[w] : 0;
    uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      const int64_t k = int64_t{w} * kCodes + i;
      uint32_t code = 0;
      if (k < source.cols && source.perm == nullptr) {
        code = given >> (i * kBits);
      } else if (k < source.cols) {
        const int column = source.perm[k];  // not checked: the host does not wait for it
        if (column >= 0 && column < source.cols) {
          code = from[column / kCodes] >> (column % kCodes * kBits);
        }
      }
      result |= (code & ((1u << kBits) - 1)) << (i % 2 * 16 + i / 2 * kBits);
    }
    return result;
  }
};

struct BFloat16Words {
  static constexpr int kCodes = 2;
  static __device__ uint32_t word(const WeightSource& source, int row, int w) {
    const uint16_t* from =
        static_cast<const uint16_t*>(source.data) + row * source.stride + int64_t{w} * 2;
    return from[0] | (w * 2 + 1 < source.cols ? static_cast<uint32_t>(from[1]) << 16 : 0u);
  }
};

template <typename Words>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(WeightSource source, int panels, int words, int64_t panel_words, uint32_t* out) {
  Tile& tile = shared<Tile>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  for (int panel = static_cast<int>(blockIdx.x); panel < panels; panel += gridDim.x) {
    for (int first = static_cast<int>(blockIdx.y) * kTileWords; first < words;
         first += static_cast<int>(gridDim.y) * kTileWords) {
      for (int r = warp; r < kPanel; r += kThreads / kWarp) {
        const int row = panel * kPanel + r, w = first + lane;
        tile.words[r][lane] = row < source.rows && w < words ? Words::word(source, row, w) : 0u;
      }
      sync_block();
      for (int i = thread; i < kPanel * kTileWords; i += kThreads) {
        const int w = i / kPanel, c = i % kPanel;
        if (first + w < words) {
          out[panel * panel_words + int64_t{first + w} * kPanel + c] = tile.words[c][w];
        }
      }
      sync_block();
    }
  }
}

// The last word of each channel: of kInt8 the sum of its codes, of kFloat8 NaN if it has one.
template <bool kSums>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(WeightSource source, int channels, int words, int64_t panel_words,
                  uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int step = static_cast<int>(gridDim.x) * (kThreads / kWarp);
  for (int row = static_cast<int>(blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp);
       row < channels; row += step) {
    int found = 0;
    if (row < source.rows) {
      for (int w = lane; w < words; w += kWarp) {
        const uint32_t four = four_bytes(source, row, int64_t{w} * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t code = four >> (8 * i) & 0xFFu;
          found += kSums ? static_cast<int>(code ^ 0x80u) - 0x80 : (code & 0x7Fu) == 0x7Fu;
        }
      }
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) found += shuffle_xor(found, mask);
    if (lane == 0) {
      const uint32_t word = kSums ? static_cast<uint32_t>(found) : found ? 0x7FC00000u : 0u;
      out[row / kPanel * panel_words + int64_t{words} * kPanel + row % kPanel] = word;
    }
  }
}

template <typename Words>
cudaError_t pack(const WeightSource& source, bool finish, uint32_t* out, cudaStream_t stream) {
  const int panels = static_cast<int>(ceil_div(source.rows, kPanel));
  const int words = static_cast<int>(ceil_div(source.cols, Words::kCodes));
  const int64_t panel_words = int64_t{words + finish} * kPanel;
  if (words == 0) return cudaSuccess;
  const dim3 grid(grid_extent(panels), grid_extent(ceil_div(words, kTileWords)));
  return launch(pack_kernel<Words>, grid, dim3(kThreads), sizeof(Tile), stream, source, panels,
                words, panel_words, out);
}

template <typename Words, bool kSums>
cudaError_t pack_and_finish(const WeightSource& source, uint32_t* out, cudaStream_t stream) {
  const cudaError_t status = pack<Words>(source, true, out, stream);
  if (status != cudaSuccess) return status;
  const int64_t channels = ceil_div(source.rows, kPanel) * kPanel;
  const int words = static_cast<int>(ceil_div(source.cols, Words::kCodes));
  const dim3 grid(grid_extent(ceil_div(channels, kThreads / kWarp)));
  return launch(finish_kernel<kSums>, grid, dim3(kThreads), 0, stream, source,
                static_cast<int>(channels), words, int64_t{words + 1} * kPanel, out);
}

}  // namespace

cudaError_t pack_weight(WeightLayout layout, const WeightSource& source, void* words,
                        cudaStream_t stream) {
  if (source.rows == 0) return cudaSuccess;
  uint32_t* out = static_cast<uint32_t*>(words);
  switch (layout) {
    case WeightLayout::kInt8:
      return pack_and_finish<Int8Words, true>(source, out, stream);
    case WeightLayout::kFloat8:
      return pack_and_finish<Float8Words, false>(source, out, stream);
    case WeightLayout::kInt4ByInt8:
      return pack<Int4ByInt8Words>(source, false, out, stream);
    case WeightLayout::kInt4:
      return pack<UnsignedWords<4>>(source, false, out, stream);
    case WeightLayout::kByte:
      return pack<UnsignedWords<8>>(source, false, out, stream);
    case WeightLayout::kBFloat16:
      return pack<BFloat16Words>(source, false, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk::cuda
