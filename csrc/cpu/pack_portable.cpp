// The kernels of pack.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/pack.inl"
