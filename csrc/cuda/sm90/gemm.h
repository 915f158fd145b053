// Products for many rows on sm_90a, with the packed weights, arguments and results of
// cuda/common/gemm.h. Only there where csrc/cuda/sm90 is compiled (QUANTKIT_CUDA_SM90).
#pragma once

#include "cuda/common/gemm.h"

namespace qk::cuda::sm90 {

// From so many rows (of each expert) on these kernels are taken. A weight of 8 bits is read at 4.8
// TB/s in the time that mma.sync, at 62% of wgmma's rate, takes for about 130 rows of an H200's
// 1979 TOPS, one of 4 bits for about 35 of its 989 TFLOP/s: below, memory is what counts, and the
// smaller tiles of the other kernels waste less of it and spread over more multiprocessors.
// Derived, not measured; QUANTKIT_CUDA_GEMM=sm80|sm90 takes either.
constexpr int kLeastRows = 65;

// Whether there is a kernel for this: not for numbers in several planes, scales that change within
// 64 columns (codes of 8 bits: 128), and rows that overlap in memory.
bool takes(WeightKind kind, DType dtype, const GemmArgs& args);

// Whether it is to be taken unasked: rows are many, and, for int8 by int4, which does not split K
// here, tiles enough for half of the multiprocessors.
bool pays(WeightKind kind, const GemmArgs& args);

GemmPlan plan_gemm(WeightKind kind, DType dtype, const GemmArgs& args);
cudaError_t gemm(WeightKind kind, DType dtype, const GemmArgs& args, const GemmPlan& plan,
                 void* workspace, cudaStream_t stream);

}  // namespace qk::cuda::sm90
