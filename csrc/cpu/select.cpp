// The tables of all families but those of select_rounding.cpp.
#include "cpu/attention.h"
#include "cpu/awq.h"
#include "cpu/factor.h"
#include "cpu/fp4.h"
#include "cpu/fp8_gemm.h"
#include "cpu/gptq.h"
#include "cpu/gram.h"
#include "cpu/histogram.h"
#include "cpu/kv_cache.h"
#include "cpu/moe.h"
#include "cpu/pointwise.h"
#include "cpu/search.h"
#include "cpu/select.h"
#include "cpu/w4a8.h"
#include "cpu/w8a8.h"
#include "cpu/wna16.h"

namespace qk {

QK_FAMILY(AttentionKernels, attention)
QK_FAMILY(KvCacheKernels, kv_cache)
QK_FAMILY(PointwiseKernels, pointwise)
QK_FAMILY(Fp4Kernels, fp4)
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
