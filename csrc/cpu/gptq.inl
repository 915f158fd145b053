// The table of gptq.h for one ISA.
#include "cpu/gptq_impl.h"

namespace qk::QK_ISA {

extern const GptqKernels gptq;
const GptqKernels gptq = {kPanel,      kColumns,  kDepth,  kPairs,      load_rows,
                          pack_factor, fit_scale, make_up, sweep_stripe};

}  // namespace qk::QK_ISA
