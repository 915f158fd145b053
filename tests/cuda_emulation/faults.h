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
};

// Reverses 64 floats and commits the fault on the way.
cudaError_t run_fault(Fault fault, const float* x, float* out);

}  // namespace qk::cuda
