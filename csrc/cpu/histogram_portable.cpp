// The kernels of histogram.h for any CPU.
#include "cpu/simd_portable.h"
#include "cpu/histogram.inl"
