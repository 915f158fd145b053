// The kernels of quantize.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/quantize.inl"
