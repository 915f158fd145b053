// The kernels of rtn.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/rtn.inl"
