// What a bulk copy leaves in shared memory, and what wgmma takes from there and from registers:
// each alone, so that tests/ops/test_sm90_layouts.py can hold them to tables of its own. nvcc
// compiles this file too, for a test on a device.
#include "layouts.h"

#include "cuda/sm90/wgmma.h"

namespace qk::cuda {
namespace {

using namespace sm90;

constexpr int kTileRows = 64, kColumns = 128, kThreadsOfGroup = 128, kSums = kColumns / 2;

struct CopyScratch {
  alignas(1024) unsigned char tile[kTileRows][kTileRowBytes];
  Barrier full;
};

__global__ void copy_kernel(const __grid_constant__ TensorMap map, int at0, int at1,
                            unsigned char* out) {
  CopyScratch& scratch = shared<CopyScratch>();
  if (threadIdx.x == 0) {
    make_barrier(scratch.full, 1);
    publish_barriers();
  }
  sync_block();
  if (threadIdx.x == 0) {
    arrive_expecting(scratch.full, kTileRows * kTileRowBytes);
    copy_tile(scratch.tile, map, scratch.full, at0, at1);
  }
  wait_for(scratch.full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kTileRowBytes; i += kWarp)
    out[i] = (&scratch.tile[0][0])[i];
}

struct ProductScratch {
  alignas(1024) unsigned char tile[kColumns][kTileRowBytes];
};

__global__ void __launch_bounds__(kThreadsOfGroup)
    product_kernel(const unsigned char* tile, const uint32_t* lefts, int step, int32_t* out) {
  ProductScratch& scratch = shared<ProductScratch>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kColumns * kTileRowBytes; i += kThreadsOfGroup)
    (&scratch.tile[0][0])[i] = tile[i];
#ifdef __CUDACC__
  asm volatile("fence.proxy.async;" ::: "memory");  // wgmma sees memory in an order of its own
#endif
  sync_block();
  Left left;
  for (int i = 0; i < 4; ++i) left.w[i] = lefts[thread * 4 + i];
  int32_t sums[kSums] = {};
  fence_products();
  begin_product<Int8>(sums, left, columns_at(scratch.tile).after(32 * step), 0);
  commit_products();
  wait_products(sums);
  for (int i = 0; i < kSums; ++i) out[thread * kSums + i] = sums[i];
}

}  // namespace

#ifndef __CUDACC__
uint64_t descriptor_of(uint32_t shared_address, int bytes) {
  return Columns{columns_bits(shared_address)}.after(bytes).descriptor;
}
#endif

}  // namespace qk::cuda

using namespace qk::cuda;

int quantkit_copied_tile(const void* x, int64_t rows, int64_t cols, int64_t stride, int at0,
                         int at1, void* out, cudaStream_t stream) {
  sm90::TensorMap map;
  const cudaError_t status = sm90::make_tensor_map(
      {x, 2, {cols, rows, 1, 1}, {1, stride, 0, 0}, {sm90::kTileRowBytes, kTileRows, 1, 1}}, &map);
  if (status != cudaSuccess) return status;
  return launch(copy_kernel, dim3(1), dim3(kWarp), sizeof(CopyScratch), stream, map, at0, at1,
                static_cast<unsigned char*>(out));
}

int quantkit_product(const void* tile, const void* left, int step, void* out, cudaStream_t stream) {
  return launch(product_kernel, dim3(1), dim3(kThreadsOfGroup), sizeof(ProductScratch), stream,
                static_cast<const unsigned char*>(tile), static_cast<const uint32_t*>(left), step,
                static_cast<int32_t*>(out));
}
