// The kernels of moe.h for AVX-512.
#include "cpu/simd_avx512.h"
// After the names that it is written in.
#include "cpu/moe.inl"
