// The kernels of fp4.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/fp4.inl"
