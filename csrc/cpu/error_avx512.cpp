// The kernels of error.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/error.inl"
