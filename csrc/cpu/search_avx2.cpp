// The kernels of search.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/search.inl"
