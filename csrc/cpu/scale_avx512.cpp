// The kernels of scale.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/scale.inl"
