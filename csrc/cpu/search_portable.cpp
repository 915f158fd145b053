// The kernels of search.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/search.inl"
