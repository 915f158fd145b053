// Products of a warp group on sm_90 (wgmma): 64 rows of a matrix in registers by columns in shared
// memory, begun here and over when they are waited for. By name, each with its twin for the host
// emulation.
//
// Warp w of the four has rows 16 w to 16 w + 15, in the layout of mma.h: with row = lane / 4 and
// pair = lane % 4, `left` holds 32 bits each of (row, first half), (row + 8, first half), (row,
// second half), (row + 8, second half), where a half is 16 bytes of the row, of which the thread
// has those from 4 pair on. Sums 4 j to 4 j + 3 are those of (row, 8 j + 2 pair), (row, 8 j + 2
// pair + 1), (row
// + 8, 8 j + 2 pair), (row + 8, 8 j + 2 pair + 1).
#pragma once

#include "cuda/common/mma.h"
#include "cuda/sm90/async.h"

namespace qk::cuda::sm90 {

// What is multiplied, 32 bytes of each row and column: Int8, Float8E4M3 (whose sums keep about 14
// bits), BFloat16, Float16.
struct Int8 {};
template <typename Kind>
struct SumOfProduct {
  using Type = float;
};
template <>
struct SumOfProduct<Int8> {
  using Type = int32_t;
};
template <typename Kind>
using ProductSum = typename SumOfProduct<Kind>::Type;

// Columns in shared memory that copy_tile has put there, a row of the tile for each: where they
// begin, 1024 bytes aligned, and 8 of them after 1024 bytes, their bytes swizzled.
struct Columns {
  uint64_t descriptor;

  // The same columns, `bytes` (multiples of 32, within the 128) further.
  __device__ Columns after(int bytes) const {
    return {descriptor + static_cast<uint64_t>(bytes >> 4)};
  }
};

constexpr uint64_t columns_bits(uint32_t address) {
  return (static_cast<uint64_t>(address) & 0x3FFFFu) >> 4 | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#ifdef __CUDACC__

__device__ __forceinline__ Columns columns_at(const void* tile) {
  return {columns_bits(shared_address(tile))};
}

// Before the first product after a wait, and whenever registers that products use were written.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Sums are not read before, nor written after, this point by the compiler's reordering.
template <typename Sum, int kSums>
__device__ __forceinline__ void hold(Sum (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    if constexpr (__is_same(Sum, float)) {
      asm volatile("" : "+f"(sums[i])::"memory");
    } else {
      asm volatile("" : "+r"(sums[i])::"memory");
    }
  }
}

// Until the products of all closed groups are in the sums.
template <typename Sum, int kSums>
__device__ __forceinline__ void wait_products(Sum (&sums)[kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(sums);
}

#define QK_NAMES_64                                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define QK_NAMES_128                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "  \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "  \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "    \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "   \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define QK_SUMS_8(how, i)                                                               \
  how(sums[i]), how(sums[i + 1]), how(sums[i + 2]), how(sums[i + 3]), how(sums[i + 4]), \
      how(sums[i + 5]), how(sums[i + 6]), how(sums[i + 7])
#define QK_SUMS_64(how, i)                                                                  \
  QK_SUMS_8(how, i), QK_SUMS_8(how, i + 8), QK_SUMS_8(how, i + 16), QK_SUMS_8(how, i + 24), \
      QK_SUMS_8(how, i + 32), QK_SUMS_8(how, i + 40), QK_SUMS_8(how, i + 48),               \
      QK_SUMS_8(how, i + 56)
#define QK_LEFT \
  "r"(left.w[0]), "r"(left.w[1]), "r"(left.w[2]), "r"(left.w[3]), "l"(columns.descriptor), "r"(add)
#define QK_WGMMA_64(kind, how, tail)                              \
  asm volatile(                                                   \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %69, 0;\n"          \
      "wgmma.mma_async.sync.aligned.m64n128" kind " " QK_NAMES_64 \
      ", {%64, %65, %66, %67}, %68, more" tail ";\n}\n"           \
      : QK_SUMS_64(how, 0)                                        \
      : QK_LEFT)
#define QK_WGMMA_128(kind, how, tail)                              \
  asm volatile(                                                    \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %133, 0;\n"          \
      "wgmma.mma_async.sync.aligned.m64n256" kind " " QK_NAMES_128 \
      ", {%128, %129, %130, %131}, %132, more" tail ";\n}\n"       \
      : QK_SUMS_64(how, 0), QK_SUMS_64(how, 64)                    \
      : QK_LEFT)

// sums = left * columns, and what they were where `add` says so; 2 kSums columns.
template <typename Kind, int kSums>
__device__ __forceinline__ void begin_product(ProductSum<Kind> (&sums)[kSums], const Left& left,
                                              const Columns& columns, int add) {
  static_assert(kSums == 64 || (kSums == 128 && __is_same(Kind, Int8)));
  if constexpr (__is_same(Kind, Int8)) {
    if constexpr (kSums == 128) {
      QK_WGMMA_128("k32.s32.s8.s8", "+r", "");
    } else {
      QK_WGMMA_64("k32.s32.s8.s8", "+r", "");
    }
  } else if constexpr (__is_same(Kind, Float8E4M3)) {
    QK_WGMMA_64("k32.f32.e4m3.e4m3", "+f", ", 1, 1");
  } else if constexpr (__is_same(Kind, BFloat16)) {
    QK_WGMMA_64("k16.f32.bf16.bf16", "+f", ", 1, 1, 0");
  } else {
    QK_WGMMA_64("k16.f32.f16.f16", "+f", ", 1, 1, 0");
  }
}

#undef QK_NAMES_64
#undef QK_NAMES_128
#undef QK_SUMS_8
#undef QK_SUMS_64
#undef QK_LEFT
#undef QK_WGMMA_64
#undef QK_WGMMA_128

#else

inline Columns columns_at(const void* tile) {
  emulation::check_aligned(tile, 1024);
  return {columns_bits(emulation::shared_offset(tile))};
}

inline void fence_products() { emulation::fence_products(); }
inline void commit_products() { emulation::commit_products(); }
template <typename Sum, int kSums>
void wait_products(Sum (&)[kSums]) {
  emulation::wait_products();
}

// Byte k of a column, from the descriptor's bits.
inline uint8_t byte_of_column(uint64_t descriptor, int column, int k) {
  const auto field = [&](int at) { return static_cast<uint32_t>(descriptor >> at & 0x3FFFu) << 4; };
  const uint32_t offset = field(0) + field(32) * static_cast<uint32_t>(column / 8) +
                          static_cast<uint32_t>(column % 8 * kTileRowBytes + k);
  return *static_cast<const uint8_t*>(emulation::shared_at(swizzled(offset), 1));
}

template <typename Kind>
struct ProductNumber {  // of 32 bytes: how many, and their values
  static constexpr int kCount = __is_same(Kind, Int8) || __is_same(Kind, Float8E4M3) ? 32 : 16;
  static auto value(const uint8_t* bytes, int k) {
    if constexpr (__is_same(Kind, Int8)) {
      return static_cast<int32_t>(static_cast<int8_t>(bytes[k]));
    } else if constexpr (__is_same(Kind, Float8E4M3)) {
      return static_cast<double>(float8_e4m3_value(bytes[k]));
    } else {
      const uint32_t bits = bytes[2 * k] | static_cast<uint32_t>(bytes[2 * k + 1]) << 8;
      return static_cast<double>(__is_same(Kind, BFloat16) ? float_of(bits << 16)
                                                           : float16_value(bits));
    }
  }
};

template <typename Kind, int kSums>
void begin_product(ProductSum<Kind> (&sums)[kSums], const Left& left, const Columns& columns,
                   int add) {
  using Sum = ProductSum<Kind>;
  using Number = ProductNumber<Kind>;
  struct Operand {
    Sum* sums;
    Left left;
    uint64_t descriptor;
    int add;
  };
  emulation::begin_product<Operand>(
      Operand{sums, left, columns.descriptor, add}, [](const Operand* in) {
        constexpr int kCount = Number::kCount;
        decltype(Number::value(nullptr, 0)) a[16][kCount], b[kCount];
        for (int row = 0; row < 16; ++row) {
          uint8_t bytes[32];
          for (int k = 0; k < 32; ++k) {
            const uint32_t word = in[row % 8 * 4 + k % 16 / 4].left.w[k / 16 * 2 + row / 8];
            bytes[k] = static_cast<uint8_t>(word >> (k % 4 * 8));
          }
          for (int k = 0; k < kCount; ++k) a[row][k] = Number::value(bytes, k);
        }
        for (int column = 0; column < 2 * kSums; ++column) {
          uint8_t bytes[32];
          for (int k = 0; k < 32; ++k) bytes[k] = byte_of_column(in[0].descriptor, column, k);
          for (int k = 0; k < kCount; ++k) b[k] = Number::value(bytes, k);
          for (int row = 0; row < 16; ++row) {
            const Operand& owner = in[row % 8 * 4 + column % 8 / 2];
            Sum& sum = owner.sums[column / 8 * 4 + row / 8 * 2 + column % 2];
            if constexpr (__is_same(Kind, Int8)) {
              uint32_t total = owner.add ? static_cast<uint32_t>(sum) : 0;
              for (int k = 0; k < kCount; ++k) total += static_cast<uint32_t>(a[row][k] * b[k]);
              sum = static_cast<int32_t>(total);
            } else {
              double total = owner.add ? static_cast<double>(sum) : 0.0;
              for (int k = 0; k < kCount; ++k) total += a[row][k] * b[k];
              sum = static_cast<float>(total);
              if constexpr (__is_same(Kind, Float8E4M3)) sum = keep_14_bits(sum);
            }
          }
        }
      });
}

#endif

}  // namespace qk::cuda::sm90
