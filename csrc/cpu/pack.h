// int4 and int8 codes in little-endian words, as ops/pack.py describes.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct PackKernels {
  // One row: `cols` codes -> ceil(cols * num_bits / 32) words. num_bits is 4 or 8; codes beyond it
  // wrap.
  void (*pack)(const int8_t* codes, int64_t cols, int num_bits, int32_t* words);
  void (*unpack)(const int32_t* words, int64_t cols, int num_bits, int8_t* codes);
};

// Those of the instruction set that dispatch.h chose.
const PackKernels& pack_kernels();

}  // namespace qk
