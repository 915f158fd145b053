// The kernels of error.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/error.inl"
