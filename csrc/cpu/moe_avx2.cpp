// The kernels of moe.h for AVX2.
#include "cpu/simd_avx2.h"
// After the names that it is written in.
#include "cpu/moe.inl"
