// The kernels of kv_cache.h for any CPU.
#include "cpu/simd_portable.h"

#include "cpu/kv_cache.inl"
