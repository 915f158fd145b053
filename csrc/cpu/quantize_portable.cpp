// The kernels of quantize.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/quantize.inl"
