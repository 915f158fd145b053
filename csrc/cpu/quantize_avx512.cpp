// The kernels of quantize.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/quantize.inl"
