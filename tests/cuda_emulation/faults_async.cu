// A kernel with a ring of one stage, filled by one warp and multiplied by four, that commits one
// fault at a time: tests/ops/test_cuda_emulation.py asks that each is found.
#include "faults_async.h"

#include "cuda/sm90/wgmma.h"

namespace qk::cuda {
namespace {

using namespace sm90;

constexpr int kRows = 128, kTiles = 2;

struct Stage {
  alignas(1024) unsigned char tile[kRows][kTileRowBytes];
  Barrier full, empty;
};

__device__ void fill(AsyncFault fault, const TensorMap& map, Stage& stage) {
  for (int t = 0; t < kTiles; ++t) {
    if (fault != AsyncFault::kFilledTooEarly) wait_for(stage.empty, (t & 1) ^ 1);
    if (threadIdx.x % kWarp == 0) {
      const int more = fault == AsyncFault::kTooManyBytes ? 16 : 0;
      arrive_expecting(stage.full, kRows * kTileRowBytes + more);
      const int off = fault == AsyncFault::kMisplacedTile ? 512 : 0;
      copy_tile(&stage.tile[0][0] + off, map, stage.full, 0, t * kRows);
    }
    sync_warp();
  }
}

__device__ void release(Stage& stage) {
  sync_warp();
  if (threadIdx.x % kWarp == 0) arrive(stage.empty);
}

__device__ void store(const int32_t (&sums)[kRows / 2], int t, int32_t* out) {
  if (threadIdx.x >= 4) return;  // the four threads of the first row
  for (int i = 0; i < kRows / 2; i += 4) {
    out[t * kRows + i * 2 + static_cast<int>(threadIdx.x) * 2] = sums[i];
    out[t * kRows + i * 2 + static_cast<int>(threadIdx.x) * 2 + 1] = sums[i + 1];
  }
}

__device__ void multiply(AsyncFault fault, Stage& stage, int32_t* out) {
  const Left ones{{0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u}};
  int32_t sums[kRows / 2] = {};
  for (int t = 0; t < kTiles; ++t) {
    if (fault != AsyncFault::kMissingWait) wait_for(stage.full, t & 1);
    if (fault != AsyncFault::kMissingFence) fence_products();
    for (int step = 0; step < 4; ++step)
      begin_product<Int8>(sums, ones, columns_at(stage.tile).after(32 * step), step > 0);
    commit_products();
    if (fault == AsyncFault::kReleasedTooEarly) {
      release(stage);
      if (t + 1 < kTiles) wait_for(stage.full, (t + 1) & 1);
    }
    if (fault == AsyncFault::kSumsTooEarly) store(sums, t, out);
    if (fault == AsyncFault::kLeftUnderWay && t + 1 == kTiles) return;
    wait_products(sums);
    if (fault != AsyncFault::kReleasedTooEarly && fault != AsyncFault::kNobodyReleases)
      release(stage);
    if (fault != AsyncFault::kSumsTooEarly) store(sums, t, out);
  }
}

__global__ void async_fault_kernel(AsyncFault fault, const __grid_constant__ TensorMap map,
                                   int32_t* out) {
  Stage& stage = shared<Stage>();
  if (threadIdx.x == 0) {
    make_barrier(stage.full, 1);
    make_barrier(stage.empty, 4);
    publish_barriers();
  }
  if (fault != AsyncFault::kMissingBarrier) sync_block();
  if (threadIdx.x >= 128) {
    fill(fault, map, stage);
  } else {
    multiply(fault, stage, out);
  }
}

}  // namespace

cudaError_t run_async_fault(AsyncFault fault, const int8_t* x, int32_t* out) {
  TensorMap map;
  const cudaError_t status = make_tensor_map({x,
                                              2,
                                              {kTileRowBytes, kTiles * kRows, 1, 1},
                                              {1, kTileRowBytes, 0, 0},
                                              {kTileRowBytes, kRows, 1, 1}},
                                             &map);
  if (status != cudaSuccess) return status;
  return launch(async_fault_kernel, dim3(1), dim3(160), sizeof(Stage), nullptr, fault, map, out);
}

}  // namespace qk::cuda
