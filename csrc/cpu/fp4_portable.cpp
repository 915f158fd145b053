// The kernels of fp4.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/fp4.inl"
