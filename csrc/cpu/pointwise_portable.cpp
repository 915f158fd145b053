// The kernels of pointwise.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/pointwise.inl"
