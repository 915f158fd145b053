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

#else

inline float min_nan(float a, float b) {
  return a != a || b != b ? float_of(0x7FFFFFFFu) : a < b ? a : b;
}
inline float max_nan(float a, float b) {
  return a != a || b != b ? float_of(0x7FFFFFFFu) : a > b ? a : b;
}
inline float widen_float16(uint32_t half) { return float16_value(half & 0xFFFFu); }
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

#endif

}  // namespace qk::cuda
