// The tables of the families that round weights and look at what came of it: all that the module
// _host takes of the kernels.
#include "cpu/error.h"
#include "cpu/pack.h"
#include "cpu/quantize.h"
#include "cpu/reduce.h"
#include "cpu/rtn.h"
#include "cpu/scale.h"
#include "cpu/select.h"

namespace qk {

QK_FAMILY(ReduceKernels, reduce)
QK_FAMILY(ScaleKernels, scale)
QK_FAMILY(QuantizeKernels, quantize)
QK_FAMILY(PackKernels, pack)
QK_FAMILY(RtnKernels, rtn)
QK_FAMILY(ErrorKernels, error)

}  // namespace qk
