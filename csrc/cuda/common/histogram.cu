// A histogram in three steps: the largest magnitude of each block of threads; one block that joins
// them, decides on the span and merges the bins there are; counting, in shared memory and from
// there into the sums. All numbers are whole, so the order of threads is nowhere to be seen.
#include "cuda/common/histogram.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr int kHalf = kHistogramBins / 2;
constexpr int kParts = 1024;

template <typename Element, typename Body>
__device__ void for_each_value(const Matrix& x, const TokenMask& mask, Body body) {
  for_each_chunk(x.rows, x.cols, [&](int row, int col, int n) {
    if (mask.data != nullptr && !mask.data[row * mask.stride]) return;
    const Chunk<Element> chunk = load_chunk<Element>(x, row, col, n);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < n) body(chunk[i]);
    }
  });
}

struct MostScratch {
  float warps[kThreads / kWarp];
};

// The largest of a block of threads, in thread 0.
__device__ float combine_most(float most, MostScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) most = max_nan(most, shuffle_xor(most, mask));
  if (thread % kWarp == 0) scratch.warps[thread / kWarp] = most;
  sync_block();
  if (thread == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) most = max_nan(most, scratch.warps[warp]);
  }
  return most;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) most_kernel(Matrix x, TokenMask mask, float* parts) {
  float most = 0.0f;
  for_each_value<Element>(
      x, mask, [&](float value) { most = max_nan(most, float_of(bits_of(value) & 0x7FFFFFFFu)); });
  most = combine_most(most, shared<MostScratch>());
  if (threadIdx.x == 0 && threadIdx.y == 0) parts[blockIdx.x] = most;
}

struct SpanScratch {
  int64_t merged[kHistogramBins];
  MostScratch most;
  float old_span, new_span;
};

// The power of two above a magnitude, as fp32 spans go.
__device__ float span_above(float most) {
  const uint32_t exponent = (bits_of(most) >> 23) + 1;  // subnormal numbers take the least span
  const uint32_t least = 127 - 100;
  return float_of((exponent < least ? least : exponent) << 23);
}

__global__ void __launch_bounds__(kThreads)
    span_kernel(const float* parts, int count, int64_t* counts, float* span, int* status) {
  SpanScratch& scratch = shared<SpanScratch>();
  float most = 0.0f;
  for (int i = threadIdx.x; i < count; i += kThreads) most = max_nan(most, parts[i]);
  most = combine_most(most, scratch.most);
  if (threadIdx.x == 0) {
    const float old = *span;
    scratch.old_span = scratch.new_span = old;
    if (!(most < float_of(0x7F000000u))) {  // 2^127
      *status = 1;
    } else if (most > 0.0f && most >= old) {
      scratch.new_span = span_above(most);
    }
  }
  sync_block();
  const float old_span = scratch.old_span, new_span = scratch.new_span;
  if (old_span == new_span) return;
  const int doublings =
      static_cast<int>(bits_of(new_span) >> 23) - static_cast<int>(bits_of(old_span) >> 23);
  if (old_span > 0.0f) {  // else all counts are of zeros, and those stay where they are
    const int joined = doublings < 12 ? 1 << doublings : kHalf;
    for (int i = threadIdx.x; i < kHistogramBins; i += kThreads) {
      const int t = i < kHalf ? kHalf - 1 - i : i - kHalf;
      int64_t sum = 0;
      if (t < kHalf / joined) {
        for (int j = 0; j < joined; ++j) {
          const int from = t * joined + j;
          sum += counts[i < kHalf ? kHalf - 1 - from : kHalf + from];
        }
      }
      scratch.merged[i] = sum;
    }
    sync_block();
    for (int i = threadIdx.x; i < kHistogramBins; i += kThreads) counts[i] = scratch.merged[i];
  }
  if (threadIdx.x == 0) *span = new_span;
}

struct CountScratch {
  uint32_t counts[kHistogramBins];
};

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Matrix x, TokenMask mask, int64_t* counts, const float* span, const int* status) {
  if (*status != 0) return;
  CountScratch& scratch = shared<CountScratch>();
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = thread; i < kHistogramBins; i += kThreads) scratch.counts[i] = 0;
  sync_block();
  const float bins = *span > 0.0f ? div_rn(static_cast<float>(kHalf), *span) : 0.0f;
  for_each_value<Element>(x, mask, [&](float value) {
    const int size = static_cast<int>(mul_rn(float_of(bits_of(value) & 0x7FFFFFFFu), bins));
    atomic_add(&scratch.counts[value < 0.0f ? kHalf - 1 - size : kHalf + size], 1u);
  });
  sync_block();
  for (int i = thread; i < kHistogramBins; i += kThreads) {
    if (scratch.counts[i] != 0) atomic_add(&counts[i], static_cast<int64_t>(scratch.counts[i]));
  }
}

ChunkGrid histogram_grid(int rows, int cols) {
  ChunkGrid over = chunk_grid(rows, cols);
  over.grid = dim3(over.grid.x < kParts ? over.grid.x : kParts);
  return over;
}

}  // namespace

int histogram_workspace(int rows, int cols) {
  return static_cast<int>(histogram_grid(rows, cols).grid.x);
}

cudaError_t histogram(const Matrix& x, const TokenMask& mask, int64_t* counts, float* span,
                      float* workspace, int* status, cudaStream_t stream) {
  const ChunkGrid over = histogram_grid(x.rows, x.cols);
  cudaError_t launched = with_element(x.dtype, [&](auto element) {
    return launch(most_kernel<decltype(element)>, over.grid, over.block, sizeof(MostScratch),
                  stream, x, mask, workspace);
  });
  if (launched != cudaSuccess) return launched;
  launched = launch(span_kernel, dim3(1), dim3(kThreads), sizeof(SpanScratch), stream, workspace,
                    static_cast<int>(over.grid.x), counts, span, status);
  if (launched != cudaSuccess) return launched;
  return with_element(x.dtype, [&](auto element) {
    return launch(count_kernel<decltype(element)>, over.grid, over.block, sizeof(CountScratch),
                  stream, x, mask, counts, span, status);
  });
}

}  // namespace qk::cuda
