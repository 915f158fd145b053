// The kernels of scale.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/scale.inl"
