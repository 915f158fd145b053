// The kernels of pack.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/pack.inl"
