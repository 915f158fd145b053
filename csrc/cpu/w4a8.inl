// The table of w4a8.h for one ISA.
#include "cpu/w4a8_impl.h"

namespace qk::QK_ISA {

extern const W4A8Kernels w4a8;
const W4A8Kernels w4a8 = {quantize_tokens, multiply, fetch_panel};

}  // namespace qk::QK_ISA
