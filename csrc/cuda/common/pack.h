// int8 codes to int32 words of 4- or 8-bit unsigned numbers and back.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

// codes int8 [rows, cols], any strides -> contiguous words [rows, ceil(cols * bits / 32)].
cudaError_t pack_int32(const Matrix& codes, int bits, void* words, cudaStream_t stream);

// Contiguous words -> contiguous int8 [rows, cols].
cudaError_t unpack_int32(const void* words, int rows, int cols, int bits, void* codes,
                         cudaStream_t stream);

}  // namespace qk::cuda
