// The table of w8a8.h for one ISA.
#include "cpu/w8a8_impl.h"

namespace qk::QK_ISA {

extern const W8A8Kernels w8a8;
const W8A8Kernels w8a8 = {quantize, multiply, multiply_columns};

}  // namespace qk::QK_ISA
