// Everything that needs PTX or a CUDA intrinsic, by name, each with its twin for the host
// emulation.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/common/numeric.h"

namespace qk::cuda {

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

#ifdef __CUDACC__

// min and max that give NaN if either is NaN (fminf and fmaxf drop it).
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float widen_float16(uint32_t half) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(static_cast<unsigned short>(half)));
  return result;
}

// 2^x to 2^-22 of it; subnormal results are 0.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Two floats to two numbers of 16 bits in one word, the first in the lower half.
__device__ __forceinline__ uint32_t narrow_float16x2(float first, float second) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

__device__ __forceinline__ uint32_t narrow_bfloat16x2(float first, float second) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

// Two floats to two FP8 codes, the first in the lower byte: saturating, NaN is 0x7F.
__device__ __forceinline__ uint32_t narrow_float8_e4m3x2(float first, float second) {
#if __CUDA_ARCH__ >= 890
  unsigned short result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
  return result;
#else
  return float8_from<3>(first) | float8_from<3>(second) << 8;
#endif
}

__device__ __forceinline__ uint32_t narrow_float8_e5m2x2(float first, float second) {
#if __CUDA_ARCH__ >= 890
  unsigned short result;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
  return result;
#else
  return float8_from<2>(first) | float8_from<2>(second) << 8;
#endif
}

// The low bytes of four words in one word, `a` lowest.
__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}

// The value of the lane `source` of the warp.
template <typename T>
__device__ __forceinline__ T shuffle_from(T value, int source) {
  return __shfl_sync(0xFFFFFFFFu, value, source);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ void atomic_or(int* address, int bits) { atomicOr(address, bits); }
__device__ __forceinline__ void atomic_add(uint32_t* address, uint32_t value) {
  atomicAdd(address, value);
}
__device__ __forceinline__ void atomic_add(int64_t* address, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

template <typename Vector>
__device__ __forceinline__ Vector load_vector(const void* address) {
  return *static_cast<const Vector*>(address);
}

template <typename Vector>
__device__ __forceinline__ void store_vector(void* address, Vector value) {
  *static_cast<Vector*>(address) = value;
}

// Sixteen bytes to shared memory, both addresses aligned; of them only the first `bytes` are read,
// the others become zeros. It has landed, for the thread that asked, once its group is waited for;
// for the others after a barrier besides. Groups are closed by copy_commit.
__device__ __forceinline__ void copy_async(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(target))),
               "l"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most the last kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Any function of three words' bits: kTable is what it makes of 0xF0, 0xCC and 0xAA.
template <int kTable>
__device__ __forceinline__ uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
}

// Four of the bytes of a (0 to 3) and b (4 to 7), chosen by the selector's nibbles, lowest first.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// a * b + c of two numbers each, rounded once.
__device__ __forceinline__ uint32_t fma_float16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
__device__ __forceinline__ uint32_t fma_bfloat16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

#else

inline float min_nan(float a, float b) {
  return a != a || b != b ? float_of(0x7FFFFFFFu) : a < b ? a : b;
}
inline float max_nan(float a, float b) {
  return a != a || b != b ? float_of(0x7FFFFFFFu) : a > b ? a : b;
}
inline float widen_float16(uint32_t half) { return float16_value(half & 0xFFFFu); }
inline float power_of_two(float x) { return __builtin_exp2f(x); }
inline uint32_t narrow_float16x2(float first, float second) {
  return float16_from(first) | float16_from(second) << 16;
}
inline uint32_t narrow_bfloat16x2(float first, float second) {
  return bfloat16_from(first) | bfloat16_from(second) << 16;
}
inline uint32_t narrow_float8_e4m3x2(float first, float second) {
  return float8_from<3>(first) | float8_from<3>(second) << 8;
}
inline uint32_t narrow_float8_e5m2x2(float first, float second) {
  return float8_from<2>(first) | float8_from<2>(second) << 8;
}
inline uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return (a & 0xFFu) | (b & 0xFFu) << 8 | (c & 0xFFu) << 16 | (d & 0xFFu) << 24;
}

template <typename T>
T shuffle_xor(T value, int lane_mask) {
  return emulation::warp_collective<T, T>("shuffle_xor", value, [lane_mask](const T* in, T* out) {
    for (int lane = 0; lane < kWarp; ++lane) out[lane] = in[lane ^ lane_mask];
  });
}

template <typename T>
T shuffle_from(T value, int source) {
  struct Operand {
    T value;
    int source;
  };
  return emulation::warp_collective<Operand, T>("shuffle_from", Operand{value, source},
                                                [](const Operand* in, T* out) {
                                                  for (int lane = 0; lane < kWarp; ++lane)
                                                    out[lane] = in[in[lane].source % kWarp].value;
                                                });
}

inline void sync_block() { emulation::sync_block(); }
inline void sync_warp() {
  emulation::warp_collective<int, int>("sync_warp", 0, [](const int*, int* out) {
    for (int lane = 0; lane < kWarp; ++lane) out[lane] = 0;
  });
}

inline void atomic_or(int* address, int bits) { *address |= bits; }
inline void atomic_add(uint32_t* address, uint32_t value) { *address += value; }
inline void atomic_add(int64_t* address, int64_t value) { *address += value; }

template <typename Vector>
Vector load_vector(const void* address) {
  emulation::check_aligned(address, alignof(Vector));
  return *static_cast<const Vector*>(address);
}

template <typename Vector>
void store_vector(void* address, Vector value) {
  emulation::check_aligned(address, alignof(Vector));
  *static_cast<Vector*>(address) = value;
}

inline void copy_async(void* target, const void* source, int bytes) {
  emulation::check_aligned(target, 16);
  emulation::check_aligned(source, 16);
  emulation::copy_async(target, source, 16, bytes);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int kPending>
void copy_wait() {
  emulation::copy_wait(kPending);
}

template <int kTable>
uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xFFu) << (8 * i);
  return result;
}

// Rounded to float in between: the kernels use them where the result is exact.
inline uint32_t fma_float16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [&](int half) {
    return fma_rn(widen_float16(a >> half), widen_float16(b >> half), widen_float16(c >> half));
  };
  return narrow_float16x2(one(0), one(16));
}
inline uint32_t fma_bfloat16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto low = [](uint32_t word) { return float_of(word << 16); };
  const auto high = [](uint32_t word) { return float_of(word & 0xFFFF0000u); };
  return narrow_bfloat16x2(fma_rn(low(a), low(b), low(c)), fma_rn(high(a), high(b), high(c)));
}

#endif

}  // namespace qk::cuda
