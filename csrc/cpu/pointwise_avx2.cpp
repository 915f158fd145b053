// The kernels of pointwise.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/pointwise.inl"
