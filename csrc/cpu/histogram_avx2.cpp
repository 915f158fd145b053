// The kernels of histogram.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/histogram.inl"
