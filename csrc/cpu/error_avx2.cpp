// The kernels of error.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/error.inl"
