// FP4 (e2m1) codes of x with given scales, two in a byte, as ops/fp4.py describes.
#pragma once

#include <cstdint>

#include "cpu/quantize.h"

namespace qk {

struct Fp4Kernels {
  // e2m1 of x / scale: saturating, to nearest even; what is negative keeps its sign if it becomes
  // zero, NaN becomes zero. `grid`: groups of an even number of columns, one row high. x.cols is
  // even; row i of `q` begins at byte i * x.cols / 2.
  void (*quantize)(DType dtype, Rows x, Scales grid, uint8_t* q);
};

// Those of the instruction set that dispatch.h chose.
const Fp4Kernels& fp4_kernels();

}  // namespace qk
