#pragma once

#include <cuda_runtime_api.h>

namespace qk::cuda {

enum class Fault {
  kNone,
  kMissingBarrier,
  kUnwrittenShared,
  kReadPast,
  kReadBefore,
  kWritePast,
  kWriteBefore,
  kSharedPast,
  kMisaligned,
  kDivergentBarrier,
  kMissingWait,     // an asynchronous copy is read before its group was waited for
  kEarlyOverwrite,  // and one begins where others still read
};

// Reverses 64 floats and commits the fault on the way.
cudaError_t run_fault(Fault fault, const float* x, float* out);

}  // namespace qk::cuda
