// Tensor cores by name: 16-bit matrices from shared memory, and their product with fp32 sums. Each
// wrapper has its twin for the host emulation.
#pragma once

#include "cuda/common/chunk.h"

namespace qk::cuda {

// As mma.m16n8k16 lays them over a warp: with row = lane / 4 and pair = lane % 4, `left` holds the
// pairs of columns (row, 2 pair), (row + 8, 2 pair), (row, 2 pair + 8), (row + 8, 2 pair + 8),
// `right` the pairs of rows (2 pair, row), (2 pair + 8, row), and `sums` the numbers (row, 2 pair),
// (row, 2 pair + 1), (row + 8, 2 pair), (row + 8, 2 pair + 1).
struct Left {
  uint32_t w[4];
};
struct Right {
  uint32_t w[2];
};
struct Sums {
  float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
};

// mma.m16n8k32 lays bytes out alike: four columns (or rows) of 8 bits where there are two of 16.
struct IntSums {
  int32_t v[4] = {0, 0, 0, 0};
};

#ifdef __CUDACC__

// Four matrices of 8 x 8, of each lane the row it names (lanes 0-7 those of the first); lane 4 r +
// p gets the pair 2 p, 2 p + 1 of row r.
__device__ __forceinline__ Words4 load_matrices(const uint16_t* row) {
  Words4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.w[0]), "=r"(m.w[1]), "=r"(m.w[2]), "=r"(m.w[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return m;
}

// The same, transposed: lane 4 c + p gets rows 2 p, 2 p + 1 of column c.
__device__ __forceinline__ Words4 load_transposed(const uint16_t* row) {
  Words4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.w[0]), "=r"(m.w[1]), "=r"(m.w[2]), "=r"(m.w[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return m;
}

#define QK_MMA(name)                                                                     \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                             \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
      : "+f"(sums.v[0]), "+f"(sums.v[1]), "+f"(sums.v[2]), "+f"(sums.v[3])               \
      : "r"(left.w[0]), "r"(left.w[1]), "r"(left.w[2]), "r"(left.w[3]), "r"(right.w[0]), \
        "r"(right.w[1]))

// sums += left * right, of Element's 16-bit numbers.
template <typename Element>
__device__ __forceinline__ void multiply_add(Sums& sums, const Left& left, const Right& right) {
  if constexpr (__is_same(Element, BFloat16)) {
    QK_MMA("bf16");
  } else {
    QK_MMA("f16");
  }
}

#undef QK_MMA

// sums += left * right, of e4m3: from sm_89 on, which is the caller's to know.
template <>
__device__ __forceinline__ void multiply_add<Float8E4M3>(Sums& sums, const Left& left,
                                                         const Right& right) {
#if __CUDA_ARCH__ >= 890
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums.v[0]), "+f"(sums.v[1]), "+f"(sums.v[2]), "+f"(sums.v[3])
      : "r"(left.w[0]), "r"(left.w[1]), "r"(left.w[2]), "r"(left.w[3]), "r"(right.w[0]),
        "r"(right.w[1]));
#else
  asm volatile("trap;");
#endif
}

// sums += left * right, of int8, modulo 2^32.
__device__ __forceinline__ void multiply_add(IntSums& sums, const Left& left, const Right& right) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums.v[0]), "+r"(sums.v[1]), "+r"(sums.v[2]), "+r"(sums.v[3])
      : "r"(left.w[0]), "r"(left.w[1]), "r"(left.w[2]), "r"(left.w[3]), "r"(right.w[0]),
        "r"(right.w[1]));
}

#else

template <bool kTransposed>
Words4 load_matrices_of_warp(const char* name, const uint16_t* row) {
  emulation::check_aligned(row, 16);
  return emulation::warp_collective<const uint16_t*, Words4>(
      name, row, [](const uint16_t* const* rows, Words4* out) {
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int m = 0; m < 4; ++m) {
            const int at = lane / 4, pair = lane % 4 * 2;
            const uint32_t low = kTransposed ? rows[m * 8 + pair][at] : rows[m * 8 + at][pair];
            const uint32_t high =
                kTransposed ? rows[m * 8 + pair + 1][at] : rows[m * 8 + at][pair + 1];
            out[lane].w[m] = low | high << 16;
          }
        }
      });
}

inline Words4 load_matrices(const uint16_t* row) {
  return load_matrices_of_warp<false>("load_matrices", row);
}
inline Words4 load_transposed(const uint16_t* row) {
  return load_matrices_of_warp<true>("load_transposed", row);
}

template <typename Element>
void multiply_add(Sums& sums, const Left& left, const Right& right) {
  struct Operand {
    Left left;
    Right right;
    Sums sums;
  };
  const auto value = [](uint32_t word, int half) {
    const uint32_t bits = half ? word >> 16 : word & 0xFFFFu;
    return __is_same(Element, BFloat16) ? float_of(bits << 16) : float16_value(bits);
  };
  sums = emulation::warp_collective<Operand, Sums>(
      "multiply_add", Operand{left, right, sums}, [value](const Operand* in, Sums* out) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int i = 0; i < 8; ++i) {
            const int part = i / 2;
            a[lane / 4 + part % 2 * 8][lane % 4 * 2 + part / 2 * 8 + i % 2] =
                value(in[lane].left.w[part], i % 2);
          }
          for (int i = 0; i < 4; ++i)
            b[lane % 4 * 2 + i / 2 * 8 + i % 2][lane / 4] = value(in[lane].right.w[i / 2], i % 2);
        }
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int i = 0; i < 4; ++i) {
            double sum = static_cast<double>(in[lane].sums.v[i]);
            for (int k = 0; k < 16; ++k) {
              sum += static_cast<double>(a[lane / 4 + i / 2 * 8][k]) *
                     static_cast<double>(b[k][lane % 4 * 2 + i % 2]);
            }
            out[lane].v[i] = static_cast<float>(sum);
          }
        }
      });
}

// What m16n8k32 gives: add(sum, row, column) of the bytes' values.
template <typename Sums, typename Value, typename Add>
void multiply_add_bytes(Sums& sums, const Left& left, const Right& right, Value value, Add add) {
  struct Operand {
    Left left;
    Right right;
    Sums sums;
  };
  sums = emulation::warp_collective<Operand, Sums>(
      "multiply_add", Operand{left, right, sums}, [value, add](const Operand* in, Sums* out) {
        decltype(value(0u)) a[16][32], b[8][32];
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int i = 0; i < 16; ++i) {
            const int part = i / 4;
            a[lane / 4 + part % 2 * 8][lane % 4 * 4 + part / 2 * 16 + i % 4] =
                value(in[lane].left.w[part] >> (i % 4 * 8) & 0xFFu);
          }
          for (int i = 0; i < 8; ++i) {
            b[lane / 4][lane % 4 * 4 + i / 4 * 16 + i % 4] =
                value(in[lane].right.w[i / 4] >> (i % 4 * 8) & 0xFFu);
          }
        }
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int i = 0; i < 4; ++i) {
            out[lane].v[i] =
                add(in[lane].sums.v[i], a[lane / 4 + i / 2 * 8], b[lane % 4 * 2 + i % 2]);
          }
        }
      });
}

inline void multiply_add(IntSums& sums, const Left& left, const Right& right) {
  multiply_add_bytes(
      sums, left, right,
      [](uint32_t byte) { return static_cast<int32_t>(static_cast<int8_t>(byte)); },
      [](int32_t before, const int32_t* row, const int32_t* col) {
        auto sum = static_cast<uint32_t>(before);
        for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(row[k] * col[k]);
        return static_cast<int32_t>(sum);
      });
}

// Of a float, what sums of FP8 keep: a mantissa of 14 bits, cut off.
inline float keep_14_bits(float value) {
  return is_finite(value) ? float_of(bits_of(value) & ~0x3FFu) : value;
}

template <>
inline void multiply_add<Float8E4M3>(Sums& sums, const Left& left, const Right& right) {
  multiply_add_bytes(
      sums, left, right, [](uint32_t byte) { return static_cast<double>(float8_e4m3_value(byte)); },
      [](float before, const double* row, const double* col) {
        auto sum = static_cast<double>(before);
        for (int k = 0; k < 32; ++k) sum += row[k] * col[k];
        return keep_14_bits(static_cast<float>(sum));
      });
}

#endif

// Blocks of 256 threads make tiles of 128 x 128: warps four by two, 32 x 64 each.
constexpr int kMmaTile = 128;
constexpr int kMmaDepth = 32;
constexpr int kMmaRow = kMmaTile + 8;    // of a shared tile [depth][128]: no bank conflicts
constexpr int kMmaDeep = kMmaDepth + 8;  // of one that is [128][depth]

struct WarpTile {
  int row, col;  // of the warp's part of the tile

  __device__ WarpTile()
      : row(static_cast<int>(threadIdx.x) / kWarp % 4 * 32),
        col(static_cast<int>(threadIdx.x) / kWarp / 4 * 64) {}

  // Two by eight products of 16 x 8; calls f(row, column, sum) within the tile.
  template <typename Function>
  __device__ void each(const Sums (&sums)[2][8], Function f) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f(row + m * 16 + lane / 4 + i / 2 * 8, col + n * 8 + lane % 4 * 2 + i % 2,
            sums[m][n].v[i]);
        }
      }
    }
  }
};

// Sixteen rows of `left` from tile[depth][row] and from tile[row][depth], and sixteen columns of
// `right`, two of them, from tile[depth][col].
__device__ inline Left left_of_columns(const uint16_t (&tile)[kMmaDepth][kMmaRow], int row, int k) {
  const int lane = threadIdx.x % kWarp, part = lane / 8;
  const Words4 m = load_transposed(&tile[k + part / 2 * 8 + lane % 8][row + part % 2 * 8]);
  return {{m.w[0], m.w[1], m.w[2], m.w[3]}};
}

__device__ inline Left left_of_rows(const uint16_t (&tile)[kMmaTile][kMmaDeep], int row, int k) {
  const int lane = threadIdx.x % kWarp, part = lane / 8;
  const Words4 m = load_matrices(&tile[row + part % 2 * 8 + lane % 8][k + part / 2 * 8]);
  return {{m.w[0], m.w[1], m.w[2], m.w[3]}};
}

struct RightPair {
  Right first, second;
};
__device__ inline RightPair right_of_columns(const uint16_t (&tile)[kMmaDepth][kMmaRow], int col,
                                             int k) {
  const int lane = threadIdx.x % kWarp, part = lane / 8;
  const Words4 m = load_transposed(&tile[k + part % 2 * 8 + lane % 8][col + part / 2 * 8]);
  return {{{m.w[0], m.w[1]}}, {{m.w[2], m.w[3]}}};
}

}  // namespace qk::cuda
