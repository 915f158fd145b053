// The kernels of reduce.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/reduce.inl"
