// A chunk is eight neighbouring elements of a row: what one thread loads, works on and stores at a
// time. Full chunks at aligned addresses move as 16-byte (8-byte for codes) vectors, all others
// element by element.
#pragma once

#include "cuda/common/intrinsics.h"
#include "cuda/common/types.h"

namespace qk::cuda {

constexpr int kChunk = 8;

struct Float32 {
  using Storage = float;
  static constexpr int kWords = 8;  // of a chunk
};
struct Float16 {
  using Storage = uint16_t;
  static constexpr int kWords = 4;
};
struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int kWords = 4;
};

template <typename Element>
struct Chunk {
  uint32_t w[Element::kWords];

  __device__ float operator[](int i) const {
    if constexpr (Element::kWords == 8) {
      return float_of(w[i]);
    } else if constexpr (__is_same(Element, BFloat16)) {
      return float_of(i % 2 ? w[i / 2] & 0xFFFF0000u : w[i / 2] << 16);
    } else {
      return widen_float16(w[i / 2] >> (i % 2 * 16));
    }
  }
};

__device__ inline bool aligned_to(const void* address, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// n <= 8 elements from (row, col) on; what lies beyond n repeats the first, which no minimum or
// maximum notices.
template <typename Element>
__device__ Chunk<Element> load_chunk(const Matrix& x, int row, int col, int n) {
  using Storage = typename Element::Storage;
  const Storage* source =
      static_cast<const Storage*>(x.data) + row * x.row_stride + col * x.col_stride;
  Chunk<Element> chunk;
  if (n == kChunk && x.col_stride == 1 && aligned_to(source, 16)) {
#pragma unroll
    for (int part = 0; part < Element::kWords / 4; ++part) {
      const Words4 words = load_vector<Words4>(source + part * (16 / sizeof(Storage)));
#pragma unroll
      for (int i = 0; i < 4; ++i) chunk.w[part * 4 + i] = words.w[i];
    }
    return chunk;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const Storage value = source[i < n ? i * x.col_stride : 0];
    if constexpr (Element::kWords == 8) {
      chunk.w[i] = bits_of(value);
    } else {
      chunk.w[i / 2] = i % 2 ? chunk.w[i / 2] | static_cast<uint32_t>(value) << 16 : value;
    }
  }
  return chunk;
}

template <typename Element>
__device__ Chunk<Element> round_chunk(const float (&values)[kChunk]) {
  Chunk<Element> chunk;
#pragma unroll
  for (int i = 0; i < Element::kWords; ++i) {
    if constexpr (Element::kWords == 8) {
      chunk.w[i] = bits_of(values[i]);
    } else if constexpr (__is_same(Element, BFloat16)) {
      chunk.w[i] = narrow_bfloat16x2(values[2 * i], values[2 * i + 1]);
    } else {
      chunk.w[i] = narrow_float16x2(values[2 * i], values[2 * i + 1]);
    }
  }
  return chunk;
}

// Stores the first n elements.
template <typename Element>
__device__ void store_chunk(void* destination, const Chunk<Element>& chunk, int n) {
  using Storage = typename Element::Storage;
  Storage* target = static_cast<Storage*>(destination);
  if (n == kChunk && aligned_to(target, 16)) {
#pragma unroll
    for (int part = 0; part < Element::kWords / 4; ++part) {
      const uint32_t* w = chunk.w + part * 4;
      store_vector(target + part * (16 / sizeof(Storage)), Words4{{w[0], w[1], w[2], w[3]}});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= n) break;
    if constexpr (Element::kWords == 8) {
      target[i] = float_of(chunk.w[i]);
    } else {
      target[i] = static_cast<Storage>(chunk.w[i / 2] >> (i % 2 * 16));
    }
  }
}

// Rounds eight floats to Element and stores the first n of them.
template <typename Element>
__device__ void store_chunk(void* destination, const float (&values)[kChunk], int n) {
  store_chunk<Element>(destination, round_chunk<Element>(values), n);
}

// Eight codes of one byte, element 0 lowest. What lies beyond n is zero.
__device__ inline Words2 load_codes(const Matrix& q, int row, int col, int n) {
  const uint8_t* source =
      static_cast<const uint8_t*>(q.data) + row * q.row_stride + col * q.col_stride;
  if (n == kChunk && q.col_stride == 1 && aligned_to(source, 8)) return load_vector<Words2>(source);
  Words2 codes{{0, 0}};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < n) codes.w[i / 4] |= static_cast<uint32_t>(source[i * q.col_stride]) << (i % 4 * 8);
  }
  return codes;
}

__device__ inline void store_codes(uint8_t* target, Words2 codes, int n) {
  if (n == kChunk && aligned_to(target, 8)) {
    store_vector(target, codes);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < n) target[i] = static_cast<uint8_t>(codes.w[i / 4] >> (i % 4 * 8));
  }
}

// Four floats, zeros beyond n.
__device__ inline Words4 load_four(const float* source, int n) {
  if (n >= 4 && aligned_to(source, 16)) return load_vector<Words4>(source);
  Words4 four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.w[i] = i < n ? bits_of(source[i]) : 0u;
  return four;
}

__device__ inline void store_four(float* target, const float (&values)[4], int n) {
  if (n >= 4 && aligned_to(target, 16)) {
    store_vector(target, Words4{{bits_of(values[0]), bits_of(values[1]), bits_of(values[2]),
                                 bits_of(values[3])}});
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < n) target[i] = values[i];
  }
}

// How threads are laid over the chunks of a matrix: x over the chunks of a row, y over rows; both
// loop past the grid.
struct ChunkGrid {
  dim3 grid, block;
};

inline ChunkGrid chunk_grid(int rows, int cols) {
  const int64_t chunks = ceil_div(cols, kChunk);
  const int width = power_of_two_at_least(chunks, kThreads);
  const int height = kThreads / width;
  return {dim3(grid_extent(ceil_div(rows, height)), grid_extent(ceil_div(chunks, width))),
          dim3(static_cast<unsigned>(width), static_cast<unsigned>(height))};
}

template <typename Body>
__device__ void for_each_chunk(int rows, int cols, Body body) {
  const int row_step = static_cast<int>(gridDim.x * blockDim.y);
  const int col_step = static_cast<int>(gridDim.y * blockDim.x) * kChunk;
  for (int row = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y); row < rows;
       row += row_step) {
    for (int col = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kChunk; col < cols;
         col += col_step) {
      body(row, col, cols - col < kChunk ? cols - col : kChunk);
    }
  }
}

// Calls `launcher` with the Element of a floating-point dtype.
template <typename Launcher>
cudaError_t with_element(DType dtype, Launcher launcher) {
  switch (dtype) {
    case DType::kFloat32:
      return launcher(Float32{});
    case DType::kFloat16:
      return launcher(Float16{});
    case DType::kBFloat16:
      return launcher(BFloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace qk::cuda
