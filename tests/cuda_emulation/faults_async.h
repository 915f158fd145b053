#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace qk::cuda {

enum class AsyncFault {
  kNone,
  kMissingWait,       // the tile is multiplied before it has landed
  kFilledTooEarly,    // the next tile is asked for while this one is multiplied
  kReleasedTooEarly,  // the tile is given back before its products are over
  kMissingFence,      // products begin without one
  kSumsTooEarly,      // sums are read before they are waited for
  kTooManyBytes,      // are announced: the barrier never goes on
  kNobodyReleases,
  kMissingBarrier,  // between making barriers and using them
  kLeftUnderWay,    // products that nobody waits for
  kMisplacedTile,   // 512 bytes off its alignment
};

// out[i] = the sum of row i of x [256][128].
cudaError_t run_async_fault(AsyncFault fault, const int8_t* x, int32_t* out);

}  // namespace qk::cuda
