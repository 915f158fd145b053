// The kernels of kv_cache.h for AVX2.
#include "cpu/simd_avx2.h"

#include "cpu/kv_cache.inl"
