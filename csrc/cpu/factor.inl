// The table of factor.h for one ISA.
#include "cpu/factor_impl.h"

namespace qk::QK_ISA {

extern const FactorKernels factor;
const FactorKernels factor = {kWidth, kRows, product, triangle, turn, diagonal};

}  // namespace qk::QK_ISA
