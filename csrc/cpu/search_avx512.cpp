// The kernels of search.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/search.inl"
