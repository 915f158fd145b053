// The kernels of reduce.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/reduce.inl"
