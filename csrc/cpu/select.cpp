// Every family's table for the instruction set that dispatch.h chose.
#include "cpu/attention.h"
#include "cpu/awq.h"
#include "cpu/dispatch.h"
#include "cpu/error.h"
#include "cpu/factor.h"
#include "cpu/fp4.h"
#include "cpu/fp8_gemm.h"
#include "cpu/gptq.h"
#include "cpu/gram.h"
#include "cpu/histogram.h"
#include "cpu/kv_cache.h"
#include "cpu/moe.h"
#include "cpu/pack.h"
#include "cpu/pointwise.h"
#include "cpu/quantize.h"
#include "cpu/reduce.h"
#include "cpu/rtn.h"
#include "cpu/scale.h"
#include "cpu/search.h"
#include "cpu/w4a8.h"
#include "cpu/w8a8.h"
#include "cpu/wna16.h"

#if QUANTKIT_X86
#define QK_FAMILY(Kernels, family)    \
  namespace portable {                \
  extern const Kernels family;        \
  }                                   \
  namespace avx2 {                    \
  extern const Kernels family;        \
  }                                   \
  namespace avx512 {                  \
  extern const Kernels family;        \
  }                                   \
  const Kernels& family##_kernels() { \
    switch (current_isa()) {          \
      case Isa::avx512:               \
        return avx512::family;        \
      case Isa::avx2:                 \
        return avx2::family;          \
      case Isa::portable:             \
        break;                        \
    }                                 \
    return portable::family;          \
  }
#else
#define QK_FAMILY(Kernels, family)                                 \
  namespace portable {                                             \
  extern const Kernels family;                                     \
  }                                                                \
  const Kernels& family##_kernels() {                              \
    current_isa(); /* a forced one that is not here is an error */ \
    return portable::family;                                       \
  }
#endif

namespace qk {

QK_FAMILY(AttentionKernels, attention)
QK_FAMILY(KvCacheKernels, kv_cache)
QK_FAMILY(ReduceKernels, reduce)
QK_FAMILY(ScaleKernels, scale)
QK_FAMILY(QuantizeKernels, quantize)
QK_FAMILY(PackKernels, pack)
QK_FAMILY(PointwiseKernels, pointwise)
QK_FAMILY(Fp4Kernels, fp4)
QK_FAMILY(RtnKernels, rtn)
QK_FAMILY(ErrorKernels, error)
QK_FAMILY(FactorKernels, factor)
QK_FAMILY(GptqKernels, gptq)
QK_FAMILY(GramKernels, gram)
QK_FAMILY(AwqKernels, awq)
QK_FAMILY(SearchKernels, search)
QK_FAMILY(HistogramKernels, histogram)
QK_FAMILY(W8A8Kernels, w8a8)
QK_FAMILY(W4A8Kernels, w4a8)
QK_FAMILY(Wna16Kernels, wna16)
QK_FAMILY(Fp8Kernels, fp8_gemm)
QK_FAMILY(MoeKernels, moe)

}  // namespace qk
