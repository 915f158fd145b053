#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// In C, so that a test can also call what nvcc has made of them.
extern "C" {

// The tile of 64 rows of 128 bytes at these coordinates of `rows` rows of `cols` bytes, `stride`
// apart, as it lies in shared memory: out [64 * 128].
int quantkit_copied_tile(const void* x, int64_t rows, int64_t cols, int64_t stride, int at0,
                         int at1, void* out, cudaStream_t stream);

// What products of 32 int8 codes make, with `tile` [128 * 128] in shared memory as it is here, from
// byte 32 * step of its rows on: the left side is left [128 threads][4 registers], the sums are out
// [128 threads][64].
int quantkit_product(const void* tile, const void* left, int step, void* out, cudaStream_t stream);
}

namespace qk::cuda {
// A descriptor's bits.
uint64_t descriptor_of(uint32_t shared_address, int bytes);
}  // namespace qk::cuda
