// The kernels of pack.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/pack.inl"
