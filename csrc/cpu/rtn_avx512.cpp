// The kernels of rtn.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/rtn.inl"
