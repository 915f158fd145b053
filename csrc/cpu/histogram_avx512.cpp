// The kernels of histogram.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/histogram.inl"
