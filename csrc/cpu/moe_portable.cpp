// The kernels of moe.h for any CPU.
#include "cpu/simd_portable.h"
// After the names that it is written in.
#include "cpu/moe.inl"
