// Scales, and the step from floats to codes and back, shared by the quantize, rtn and error
// kernels.
#pragma once

#include "cuda/common/chunk.h"

namespace qk::cuda {

// Smallest and largest value seen; NaN in either once a NaN was seen.
struct Range {
  float low = float_of(0x7F800000u), high = float_of(0xFF800000u);

  __device__ void include(const Range& other) {
    low = min_nan(low, other.low);
    high = max_nan(high, other.high);
  }

  template <typename Element>
  __device__ void include(const Chunk<Element>& chunk) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      low = min_nan(low, chunk[i]);
      high = max_nan(high, chunk[i]);
    }
  }

  // Of nothing at all: zeros.
  __device__ Range finished() const { return low > high ? Range{0.0f, 0.0f} : *this; }
  __device__ float absmax() const {
    return max_nan(float_of(bits_of(low) & 0x7FFFFFFFu), float_of(bits_of(high) & 0x7FFFFFFFu));
  }
};

// `team` threads (a power of two up to a warp, or the whole block) combine their ranges; all of
// them get the result.
struct TeamScratch {
  Range warps[kWarp];
};

__device__ inline Range combine(Range range, int team, TeamScratch& scratch) {
  for (int mask = (team < kWarp ? team : kWarp) / 2; mask > 0; mask /= 2) {
    range.include(Range{shuffle_xor(range.low, mask), shuffle_xor(range.high, mask)});
  }
  if (team <= kWarp) return range;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) scratch.warps[threadIdx.x / kWarp] = range;
  sync_block();
  Range all = lane < team / kWarp ? scratch.warps[lane] : Range{};
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    all.include(Range{shuffle_xor(all.low, mask), shuffle_xor(all.high, mask)});
  }
  sync_block();  // scratch may be written again
  return all;
}

// How wide a team has to be for `chunks` chunks, about four of them each: 1, 2, ... 32, then whole
// warps to 512.
constexpr int kChunksKept = 4;
constexpr int kMaxTeam = 512;

inline int team_for(int64_t chunks) {
  const int64_t threads = ceil_div(chunks, kChunksKept);
  if (threads <= kWarp) return power_of_two_at_least(threads, kWarp);
  const int64_t warps = ceil_div(threads, kWarp);
  return static_cast<int>((warps < kMaxTeam / kWarp ? warps : kMaxTeam / kWarp) * kWarp);
}

// The part of the matrix that block number `index` covers; nothing if there is no such block.
struct Tile {
  int row, col, rows, cols;
  int row_chunks, chunks;

  __device__ Tile(const Matrix& x, const Blocks& blocks, int index) {
    const bool exists = index < count(blocks);
    const int grid_row = !exists ? 0 : blocks.grid_cols == 1 ? index : index / blocks.grid_cols;
    const int grid_col = exists ? index - grid_row * blocks.grid_cols : 0;
    row = grid_row * blocks.rows;
    col = grid_col * blocks.cols;
    rows = exists ? min(blocks.rows, x.rows - row) : 0;
    cols = min(blocks.cols, x.cols - col);
    row_chunks = (cols + kChunk - 1) / kChunk;
    chunks = rows * row_chunks;
  }

  struct Position {
    int row, col, n;
  };
  __device__ Position at(int chunk) const {
    const int r =
        rows == 1
            ? 0
            : static_cast<int>(static_cast<unsigned>(chunk) / static_cast<unsigned>(row_chunks));
    const int c = (chunk - r * row_chunks) * kChunk;
    return {row + r, col + c, min(cols - c, kChunk)};
  }
};

// Which block the elements of a chunk lie in: number `first`, and all of them there if `one_block`.
struct BlockIndex {
  int row_start, first;
  bool one_block;

  __device__ BlockIndex(const Blocks& blocks, int row, int col, int n)
      : row_start((blocks.grid_rows == 1 ? 0
                   : blocks.rows == 1    ? row
                                         : row / blocks.rows) *
                  blocks.grid_cols),
        first(row_start + (blocks.grid_cols == 1 ? 0 : col / blocks.cols)),
        one_block(blocks.grid_cols == 1 || (col + n - 1) / blocks.cols == first - row_start) {}

  __device__ int of(const Blocks& blocks, int col) const { return row_start + col / blocks.cols; }
};

// --- scales
// -------------------------------------------------------------------------------------------------------

QK_HOST_DEVICE float round_scale(float scale, DType dtype) {
  float smallest = float_of((127u - 100u) << 23);
  if (dtype == DType::kFloat16) {
    scale = float16_value(float16_from(scale));
    smallest = float_of((127u - 24u) << 23);
  } else if (dtype == DType::kBFloat16) {
    scale = float_of(bfloat16_from(scale) << 16);
  }
  return scale < smallest ? smallest : scale;  // NaN stays
}

QK_HOST_DEVICE float symmetric_scale(float amax, float divisor, DType dtype) {
  return round_scale(div_rn(amax, divisor), dtype);
}

struct ScaleAndZero {
  float scale;
  int zero_point;
};

__device__ inline ScaleAndZero asymmetric_scale(const Range& range, int q_min, int q_max,
                                                DType dtype) {
  const float low = min_nan(range.low, 0.0f), high = max_nan(range.high, 0.0f);
  const float scale =
      round_scale(div_rn(sub_rn(high, low), static_cast<float>(q_max - q_min)), dtype);
  const float steps = div_rn(low, scale);
  if (steps != steps) return {scale, 0};
  // Clamped before it is rounded, to stay where round_to_int is right; the bounds are whole, so
  // nothing changes.
  const float kept = fminf(fmaxf(steps, static_cast<float>(q_min - q_max)), 0.0f);
  return {scale, q_min - round_to_int(kept)};
}

// --- codes
// --------------------------------------------------------------------------------------------------------

// Makes codes with one scale: q = clamp(round(x * inverse) + zero_point), or FP8 of x * inverse.
struct Quantizer {
  DType code;
  int zero_point;
  float inverse, low, high;  // low, high: the range of codes less the zero point

  __device__ Quantizer(DType code, float scale, int zero_point, int q_min, int q_max)
      : code(code),
        zero_point(zero_point),
        inverse(div_rn(1.0f, scale)),
        low(static_cast<float>(q_min - zero_point)),
        high(static_cast<float>(q_max - zero_point)) {}

  __device__ uint32_t integer(float value) const {
    float steps = mul_rn(value, inverse);
    steps = steps == steps ? steps : 0.0f;
    // Clamping to whole bounds and rounding may change places.
    return static_cast<uint32_t>(round_to_int(fminf(fmaxf(steps, low), high)) + zero_point);
  }

  __device__ uint32_t one(float value) const {
    if (code == DType::kInt8) return integer(value) & 0xFFu;
    const float scaled = mul_rn(value, inverse);
    return code == DType::kFloat8E4M3 ? narrow_float8_e4m3x2(scaled, 0.0f)
                                      : narrow_float8_e5m2x2(scaled, 0.0f);
  }

  template <typename Values>
  __device__ Words2 operator()(const Values& values) const {
    Words2 codes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = half * 4;
      if (code == DType::kInt8) {
        codes.w[half] = gather_bytes(integer(values[i]), integer(values[i + 1]),
                                     integer(values[i + 2]), integer(values[i + 3]));
      } else {
        const float a = mul_rn(values[i], inverse), b = mul_rn(values[i + 1], inverse);
        const float c = mul_rn(values[i + 2], inverse), d = mul_rn(values[i + 3], inverse);
        codes.w[half] = code == DType::kFloat8E4M3
                            ? narrow_float8_e4m3x2(a, b) | narrow_float8_e4m3x2(c, d) << 16
                            : narrow_float8_e5m2x2(a, b) | narrow_float8_e5m2x2(c, d) << 16;
      }
    }
    return codes;
  }
};

// The value of a code, before zero point and scale.
__device__ inline float code_value(DType code, uint32_t byte) {
  if (code == DType::kInt8) return static_cast<float>(static_cast<int8_t>(byte));
  return code == DType::kFloat8E4M3 ? float8_e4m3_value(byte & 0xFFu) : float8_e5m2_value(byte);
}

// --- where codes go
// -----------------------------------------------------------------------------------------------

// Codes of 4 or 8 bits as unsigned numbers (q + 2^(bits-1)), in words; bytes beyond n become zero.
__device__ inline uint32_t to_unsigned(uint32_t codes, int bits, int n) {
  const uint32_t kept = n >= 4 ? 0xFFFFFFFFu : n <= 0 ? 0u : (1u << (8 * n)) - 1u;
  return (bits == 4 ? (codes ^ 0x08080808u) & 0x0F0F0F0Fu : codes ^ 0x80808080u) & kept;
}

__device__ inline uint32_t squeeze_nibbles(uint32_t bytes) {
  bytes = (bytes | bytes >> 4) & 0x00FF00FFu;
  return (bytes | bytes >> 8) & 0x0000FFFFu;
}

// A contiguous output of codes: bytes [rows, cols] (`pack_bits` 0), or words [rows, ceil(cols *
// pack_bits / 32)].
struct CodeOutput {
  uint8_t* data;
  int64_t row_bytes;
  int pack_bits;

  // `col` is a multiple of 8 unless pack_bits is 0.
  __device__ void store(int row, int col, Words2 codes, int n) const {
    uint8_t* target = data + row * row_bytes;
    if (pack_bits == 0) {
      store_codes(target + col, codes, n);
      return;
    }
    const Words2 words{
        {to_unsigned(codes.w[0], pack_bits, n), to_unsigned(codes.w[1], pack_bits, n - 4)}};
    if (pack_bits == 8) {
      store_codes(target + col, words, n <= 4 ? 4 : 8);
    } else {
      store_vector(target + col / 2, squeeze_nibbles(words.w[0]) | squeeze_nibbles(words.w[1])
                                                                       << 16);
    }
  }
};

inline CodeOutput code_output(void* data, int64_t cols, int pack_bits) {
  const int64_t row_bytes = pack_bits == 0 ? cols : ceil_div(cols * pack_bits, 32) * 4;
  return {static_cast<uint8_t*>(data), row_bytes, pack_bits};
}

}  // namespace qk::cuda
