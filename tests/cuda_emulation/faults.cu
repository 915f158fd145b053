// A kernel that commits one fault at a time: tests/ops/test_cuda_emulation.py asks that each is
// found.
#include "faults.h"

#include "cuda/common/intrinsics.h"

namespace qk::cuda {
namespace {

struct Exchange {
  alignas(16) float values[64];
};

__global__ void fault_kernel(Fault fault, const float* x, float* out) {
  Exchange& exchange = shared<Exchange>();
  const int thread = threadIdx.x;
  if (fault != Fault::kUnwrittenShared && fault != Fault::kMissingWait)
    exchange.values[thread] = x[thread];
  if (fault == Fault::kMissingWait && thread < 16) {
    copy_async(&exchange.values[4 * thread], x + 4 * thread, 16);
    copy_commit();
  }
  if (fault != Fault::kMissingBarrier) sync_block();
  if (fault == Fault::kEarlyOverwrite && thread < 16) {
    copy_async(&exchange.values[4 * thread], x + (60 - 4 * thread), 16);
    copy_commit();
  }
  out[thread] = exchange.values[63 - thread];
  switch (fault) {
    case Fault::kNone:
    case Fault::kMissingBarrier:
    case Fault::kUnwrittenShared:
      break;
    case Fault::kMissingWait:
    case Fault::kEarlyOverwrite:
      copy_wait<0>();
      break;
    case Fault::kReadPast:
      out[thread] += x[thread + 1];
      break;
    case Fault::kReadBefore:
      out[thread] += x[thread - 1];
      break;
    case Fault::kWritePast:
      out[thread + 1] = 0.0f;
      break;
    case Fault::kWriteBefore:
      out[thread - 1] = 0.0f;
      break;
    case Fault::kMisaligned:
      out[thread] = float_of(load_vector<Words2>(x + (thread < 63 ? thread : 0)).w[0]);
      break;
    case Fault::kDivergentBarrier:
      if (thread % 2 == 0) {
        sync_block();
      } else {
        out[thread] = shuffle_xor(out[thread], 1);
      }
      break;
    case Fault::kSharedPast:
      out[thread] = exchange.values[thread + 1];
      break;
  }
}

}  // namespace

cudaError_t run_fault(Fault fault, const float* x, float* out) {
  return launch(fault_kernel, dim3(1), dim3(64), sizeof(Exchange), nullptr, fault, x, out);
}

}  // namespace qk::cuda
