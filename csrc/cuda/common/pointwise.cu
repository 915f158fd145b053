// A block of threads takes a row: it keeps up to four chunks a thread in registers, and whatever is
// wider is read again, from L2. A norm needs the sum of all squares before its first result, codes
// need the largest magnitude of all results as they are rounded.
#include "cuda/common/pointwise.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

struct RowScratch {
  TeamScratch team;
  float sums[kWarp];
};

// The sum over the block, in a fixed order, for all its threads.
__device__ float block_sum(float value, RowScratch& scratch) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) scratch.sums[threadIdx.x / kWarp] = value;
  sync_block();
  float total = lane < warps ? scratch.sums[lane] : 0.0f;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  sync_block();  // scratch may be written again
  return total;
}

template <typename Element>
struct Norm {
  static constexpr bool kReduces = true;
  Matrix x, residual;
  const void* weight;
  float epsilon;
  void* sum;

  // What is normalised. `store`: the sum is wanted.
  __device__ Chunk<Element> first(int row, int col, int n, bool store) const {
    const Chunk<Element> one = load_chunk<Element>(x, row, col, n);
    if (residual.data == nullptr) return one;
    const Chunk<Element> other = load_chunk<Element>(residual, row, col, n);
    float values[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = add_rn(one[i], other[i]);
    const Chunk<Element> both = round_chunk<Element>(values);
    if (store) {
      auto* target = static_cast<typename Element::Storage*>(sum) + int64_t{row} * x.cols + col;
      store_chunk<Element>(target, both, n);
    }
    return both;
  }
  __device__ float factor(float squares) const {
    return div_rn(1.0f, sqrtf(add_rn(div_rn(squares, static_cast<float>(x.cols)), epsilon)));
  }
  __device__ Chunk<Element> second(const Chunk<Element>& chunk, int col, int n,
                                   float factor) const {
    const Matrix row{weight, x.dtype, 1, x.cols, 0, 1};
    const Chunk<Element> scale = load_chunk<Element>(row, 0, col, n);
    float values[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = mul_rn(mul_rn(chunk[i], factor), scale[i]);
    return round_chunk<Element>(values);
  }
};

template <typename Element>
struct Gate {
  static constexpr bool kReduces = false;
  Matrix x, up;

  __device__ Chunk<Element> first(int row, int col, int n, bool) const {
    const Chunk<Element> gate = load_chunk<Element>(x, row, col, n);
    const Chunk<Element> other = load_chunk<Element>(up, row, col, n);
    float values[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      // Of 2^126 and more the quotient is 0 for all that is rounded to.
      const float steps = mul_rn(gate[i], -1.44269504f);
      const float power = power_of_two(steps < 126.0f ? steps : 126.0f);
      const float silu = div_rn(gate[i], add_rn(1.0f, power));
      values[i] = mul_rn(silu, other[i]);
    }
    return round_chunk<Element>(values);
  }
  __device__ float factor(float) const { return 0.0f; }
  __device__ Chunk<Element> second(const Chunk<Element>& chunk, int, int, float) const {
    return chunk;
  }
};

template <typename Element, typename Source>
__global__ void __launch_bounds__(kThreads) row_kernel(Source source, RowOutput out) {
  RowScratch& scratch = shared<RowScratch>();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int cols = source.x.cols, chunks = (cols + kChunk - 1) / kChunk;
  const auto columns = [&](int chunk) { return min(cols - chunk * kChunk, kChunk); };
  for (int row = static_cast<int>(blockIdx.x); row < source.x.rows;
       row += static_cast<int>(gridDim.x)) {
    const auto read = [&](int chunk, bool store) {
      return source.first(row, chunk * kChunk, columns(chunk), store);
    };
    Chunk<Element> kept[kChunksKept];
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      if (thread + k * threads < chunks) kept[k] = read(thread + k * threads, true);
    }
    float factor = 0.0f;
    if constexpr (Source::kReduces) {
      float squares = 0.0f;
      const auto add = [&](int chunk, const Chunk<Element>& values) {
        const int n = columns(chunk);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i < n) squares = fma_rn(values[i], values[i], squares);
        }
      };
#pragma unroll
      for (int k = 0; k < kChunksKept; ++k) {
        if (thread + k * threads < chunks) add(thread + k * threads, kept[k]);
      }
      for (int chunk = thread + kChunksKept * threads; chunk < chunks; chunk += threads)
        add(chunk, read(chunk, true));
      factor = source.factor(block_sum(squares, scratch));
    }
    const auto finish = [&](int chunk, const Chunk<Element>& values) {
      return source.second(values, chunk * kChunk, columns(chunk), factor);
    };
    Range range;
    const auto take = [&](int chunk, const Chunk<Element>& values) {
      range.include(values);
      if (out.values == nullptr) return;
      auto* target = static_cast<typename Element::Storage*>(out.values) + int64_t{row} * cols +
                     chunk * kChunk;
      store_chunk<Element>(target, values, columns(chunk));
    };
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      const int chunk = thread + k * threads;
      if (chunk >= chunks) continue;
      kept[k] = finish(chunk, kept[k]);
      take(chunk, kept[k]);
    }
    for (int chunk = thread + kChunksKept * threads; chunk < chunks; chunk += threads)
      take(chunk, finish(chunk, read(chunk, false)));
    if (out.values != nullptr) continue;

    range = combine(range, threads, scratch.team).finished();
    const float divisor = out.code == DType::kInt8         ? 127.0f
                          : out.code == DType::kFloat8E4M3 ? 448.0f
                                                           : 57344.0f;
    const float scale = symmetric_scale(range.absmax(), divisor, DType::kFloat32);
    if (thread == 0) out.scale[row] = scale;
    const Quantizer quantize(out.code, scale, 0, -127, 127);
    const auto store = [&](int chunk, const Chunk<Element>& values) {
      store_codes(out.codes + int64_t{row} * cols + chunk * kChunk, quantize(values),
                  columns(chunk));
    };
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      if (thread + k * threads < chunks) store(thread + k * threads, kept[k]);
    }
    for (int chunk = thread + kChunksKept * threads; chunk < chunks; chunk += threads)
      store(chunk, finish(chunk, read(chunk, false)));
  }
}

template <typename Element, typename Source>
cudaError_t launch_rows(const Source& source, const RowOutput& out, cudaStream_t stream) {
  if (source.x.rows == 0 || source.x.cols == 0) return cudaSuccess;
  const int64_t warps = ceil_div(ceil_div(source.x.cols, kChunk), kWarp);
  const int64_t threads = (warps < kThreads / kWarp ? warps : kThreads / kWarp) * kWarp;
  return launch(row_kernel<Element, Source>, dim3(grid_extent(source.x.rows)),
                dim3(static_cast<unsigned>(threads)), sizeof(RowScratch), stream, source, out);
}

// ---- rotary embedding: a thread turns a chunk of a head's first half and its partners ----
template <typename Element>
__global__ void __launch_bounds__(kThreads) rotary_kernel(Heads x, Angles angles, void* out) {
  using Storage = typename Element::Storage;
  const int half = angles.half, rest = x.size - 2 * half;
  const int turned = (half + kChunk - 1) / kChunk, kept = (rest + kChunk - 1) / kChunk;
  for_each_chunk(
      x.batch * x.tokens * x.heads, (turned + kept) * kChunk, [&](int index, int place, int) {
        const int token = index / x.heads, h = index - token * x.heads;
        const int b = token / x.tokens, t = token - b * x.tokens;
        const int64_t start = b * x.strides[0] + h * x.strides[1] + t * x.strides[2];
        const auto row = [&](const void* data, int64_t offset) {
          return Matrix{static_cast<const Storage*>(data) + offset, x.dtype, 1, x.size, 0, 1};
        };
        const Matrix source = row(x.data, start);
        Storage* target = static_cast<Storage*>(out) + int64_t{index} * x.size;
        const int chunk = place / kChunk;
        if (chunk >= turned) {
          const int col = 2 * half + (chunk - turned) * kChunk, n = min(x.size - col, kChunk);
          store_chunk<Element>(target + col, load_chunk<Element>(source, 0, col, n), n);
          return;
        }
        const int col = chunk * kChunk, n = min(half - col, kChunk);
        const Matrix cosine =
            row(angles.cosine, b * angles.cosine_strides[0] + t * angles.cosine_strides[1]);
        const Matrix sine =
            row(angles.sine, b * angles.sine_strides[0] + t * angles.sine_strides[1]);
        const auto one = load_chunk<Element>(source, 0, col, n);
        const auto other = load_chunk<Element>(source, 0, half + col, n);
        const auto c0 = load_chunk<Element>(cosine, 0, col, n);
        const auto c1 = load_chunk<Element>(cosine, 0, half + col, n);
        const auto s0 = load_chunk<Element>(sine, 0, col, n);
        const auto s1 = load_chunk<Element>(sine, 0, half + col, n);
        float first[kChunk], second[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          first[i] = sub_rn(mul_rn(one[i], c0[i]), mul_rn(other[i], s0[i]));
          second[i] = add_rn(mul_rn(other[i], c1[i]), mul_rn(one[i], s1[i]));
        }
        store_chunk<Element>(target + col, first, n);
        store_chunk<Element>(target + half + col, second, n);
      });
}

}  // namespace

cudaError_t rms_norm(const Matrix& x, const Matrix& residual, const void* weight, float epsilon,
                     void* sum, const RowOutput& out, cudaStream_t stream) {
  return with_element(x.dtype, [&](auto element) {
    using Element = decltype(element);
    return launch_rows<Element>(Norm<Element>{x, residual, weight, epsilon, sum}, out, stream);
  });
}

cudaError_t silu_mul(const Matrix& gate, const Matrix& up, const RowOutput& out,
                     cudaStream_t stream) {
  return with_element(gate.dtype, [&](auto element) {
    using Element = decltype(element);
    return launch_rows<Element>(Gate<Element>{gate, up}, out, stream);
  });
}

cudaError_t rotary_embedding(const Heads& x, const Angles& angles, void* out, cudaStream_t stream) {
  const int rows = x.batch * x.tokens * x.heads;
  if (rows == 0 || x.size == 0) return cudaSuccess;
  const int64_t chunks = ceil_div(angles.half, kChunk) + ceil_div(x.size - 2 * angles.half, kChunk);
  const ChunkGrid grid = chunk_grid(rows, static_cast<int>(chunks * kChunk));
  return with_element(x.dtype, [&](auto element) {
    return launch(rotary_kernel<decltype(element)>, grid.grid, grid.block, 0, stream, x, angles,
                  out);
  });
}

}  // namespace qk::cuda
