// The table of pack.h for one ISA.
#include "cpu/pack_impl.h"

namespace qk::QK_ISA {

extern const PackKernels pack;
const PackKernels pack = {row_pack, row_unpack};

}  // namespace qk::QK_ISA
