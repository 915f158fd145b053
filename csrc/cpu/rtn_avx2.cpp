// The kernels of rtn.h for AVX2.
#include "cpu/simd_avx2.h"
#include "cpu/rtn.inl"
