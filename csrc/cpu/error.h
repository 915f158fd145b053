// How far a quantized matrix is from its source.
#pragma once

#include <cstdint>

#include "cpu/quantize.h"
#include "cpu/types.h"

namespace qk {

struct ErrorKernels {
  // For each row: sum of (x - x^)^2, sum of x^2, max |x - x^|, max |x| -> out[4 * row ...]. x^ = (q
  // - zero_point) * scale in fp32. x and q name the same rows.
  void (*quantization_error)(DType dtype, Rows x, DType format, Rows q, Scales grid, double* out);
};

// Those of the instruction set that dispatch.h chose.
const ErrorKernels& error_kernels();

}  // namespace qk
