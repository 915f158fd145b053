// The table of scale.h for one ISA.
#include "cpu/scale_impl.h"

namespace qk::QK_ISA {

extern const ScaleKernels scale;
const ScaleKernels scale = {symmetric_scales, asymmetric_scales};

}  // namespace qk::QK_ISA
