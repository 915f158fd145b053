// The kernels of pointwise.h for AVX-512.
#include "cpu/exp2_avx512.h"
#include "cpu/simd_avx512.h"

#include "cpu/pointwise.inl"
