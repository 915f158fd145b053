// The kernels of scale.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/scale.inl"
