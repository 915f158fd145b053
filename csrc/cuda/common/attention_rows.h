// What packing keys and attending share: a warp reads a row of a head, and rounds it.
#pragma once

#include "cuda/common/attention.h"
#include "cuda/common/chunk.h"

namespace qk::cuda {

// A lane holds chunks lane and lane + 32 of a row of at most 512 numbers; zeros beyond.
constexpr int kRowChunks = kMaxHeadSize / kChunk / kWarp;

struct RowPart {
  float v[kRowChunks][kChunk];
};

template <typename Element>
__device__ void read_row_as(const void* row, DType dtype, int size, RowPart& part) {
  const int lane = threadIdx.x % kWarp;
  const Matrix matrix{row, dtype, 1, size, 0, 1};
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int col = (lane + c * kWarp) * kChunk;
    if (col >= size) continue;
    const Chunk<Element> chunk = load_chunk<Element>(matrix, 0, col, kChunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) part.v[c][i] = chunk[i];
  }
}

// Row (b, h, t); zeros if there is none (t < 0).
__device__ inline RowPart read_row(const HeadRows& x, int b, int h, int t, int size) {
  RowPart part;
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) part.v[c][i] = 0.0f;
  }
  if (t < 0) return part;
  const int64_t at = b * x.strides[0] + h * x.strides[1] + t * x.strides[2];
  if (x.dtype == DType::kFloat32) {
    read_row_as<Float32>(static_cast<const float*>(x.data) + at, x.dtype, size, part);
  } else if (x.dtype == DType::kFloat16) {
    read_row_as<Float16>(static_cast<const uint16_t*>(x.data) + at, x.dtype, size, part);
  } else {
    read_row_as<BFloat16>(static_cast<const uint16_t*>(x.data) + at, x.dtype, size, part);
  }
  return part;
}

// The largest magnitude over the warp; NaN if there is one.
__device__ inline float warp_absmax(const RowPart& part) {
  float most = 0.0f;
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      most = max_nan(most, float_of(bits_of(part.v[c][i]) & 0x7FFFFFFFu));
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) most = max_nan(most, shuffle_xor(most, mask));
  return most;
}

// Scale of codes within +-127, and the code of a number.
__device__ inline float code_scale(float amax) {
  const float scale = div_rn(amax, 127.0f);
  return scale < 0x1p-100f ? 0x1p-100f : scale;
}
__device__ inline uint32_t code_of(float x, float inverse) {
  return static_cast<uint32_t>(round_to_int(fminf(fmaxf(mul_rn(x, inverse), -127.0f), 127.0f)));
}

// The row as int8 codes or as bf16 to `target`, [size] of them; by the whole warp.
__device__ inline void store_codes_of(const RowPart& part, float scale, int size, uint8_t* target) {
  const int lane = threadIdx.x % kWarp;
  const float inverse = div_rn(1.0f, scale);
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int col = (lane + c * kWarp) * kChunk;
    if (col >= size) continue;
    uint32_t code[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) code[i] = code_of(part.v[c][i], inverse);
    store_vector(target + col, Words2{{gather_bytes(code[0], code[1], code[2], code[3]),
                                       gather_bytes(code[4], code[5], code[6], code[7])}});
  }
}
__device__ inline void store_bfloat16(const RowPart& part, int size, uint8_t* target) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int col = (lane + c * kWarp) * kChunk;
    if (col >= size) continue;
    const float (&v)[kChunk] = part.v[c];
    store_vector(target + 2 * col,
                 Words4{{narrow_bfloat16x2(v[0], v[1]), narrow_bfloat16x2(v[2], v[3]),
                         narrow_bfloat16x2(v[4], v[5]), narrow_bfloat16x2(v[6], v[7])}});
  }
}

// Keys [begin, end) of batch row b are valid.
struct Valid {
  int begin, end;

  __device__ Valid(const AttentionHow& how, int b, int keys) {
    const int64_t last = how.lengths ? how.lengths[b] : keys;
    end = static_cast<int>(last < 0 ? 0 : last < keys ? last : keys);
    const int64_t first = how.starts ? how.starts[b] : 0;
    begin = static_cast<int>(first < 0 ? 0 : first < end ? first : end);
  }
};

}  // namespace qk::cuda
