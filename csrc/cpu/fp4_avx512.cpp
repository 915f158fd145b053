// The kernels of fp4.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/fp4.inl"
