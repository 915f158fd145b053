// The kernels of reduce.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/reduce.inl"
