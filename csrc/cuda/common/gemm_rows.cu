// Rows on their way into a product. A block of threads quantizes one row, or a group of it, as
// rtn.cu does.
#include "cuda/common/gemm_rows.h"

#include "cuda/common/gemm_finish.h"
#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

// Eight values of a row as floats, those of columns that are left out zero.
template <typename Element>
struct Eight {
  float v[kChunk];

  __device__ Eight(const Matrix& x, const bool* left_out, int row, int col, int n) {
    const Chunk<Element> chunk = load_chunk<Element>(x, row, col, n);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      v[i] = left_out != nullptr && left_out[col + (i < n ? i : 0)] ? 0.0f : chunk[i];
    }
  }
  __device__ float operator[](int i) const { return v[i]; }
  __device__ Range range() const {
    Range range;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) range.include(Range{v[i], v[i]});
    return range;
  }
};

template <typename Element>
__global__ void __launch_bounds__(kMaxTeam)
    int8_rows_kernel(const __grid_constant__ Int8Rows rows) {
  TeamScratch& scratch = shared<TeamScratch>();
  const Matrix& x = rows.x;
  const int step = static_cast<int>(blockDim.x) * kChunk;
  const int first = static_cast<int>(threadIdx.x) * kChunk;
  for (int row = static_cast<int>(blockIdx.x); row < x.rows; row += static_cast<int>(gridDim.x)) {
    Range range;
    for (int col = first; col < x.cols; col += step)
      range.include(Eight<Element>(x, rows.left_out, row, col, min(x.cols - col, kChunk)).range());
    range = combine(range, static_cast<int>(blockDim.x), scratch).finished();
    const bool nan = range.low != range.low;
    ScaleAndZero found{0.0f, 0};
    if (rows.scale != nullptr && x.cols > 0) {
      const int expert = rows.experts.count == 0 ? 0 : expert_of(rows.experts, row);
      found.scale = rows.scale[expert];
      found.zero_point = rows.zero_point == nullptr ? 0 : rows.zero_point[expert];
    } else if (rows.symmetric) {
      found.scale = symmetric_scale(range.absmax(), 127.0f, DType::kFloat32);
    } else {
      found = asymmetric_scale(range, -128, 127, DType::kFloat32);
    }
    if (threadIdx.x == 0) {
      rows.row_scale[row] = nan ? float_of(0x7FC00000u) : found.scale;
      if (rows.row_zero != nullptr) rows.row_zero[row] = found.zero_point;
    }
    const bool symmetric = rows.symmetric && (rows.scale == nullptr || rows.zero_point == nullptr);
    const Quantizer quantize(DType::kInt8, found.scale, found.zero_point, symmetric ? -127 : -128,
                             127);
    uint8_t* const codes = reinterpret_cast<uint8_t*>(rows.codes) + row * rows.row_bytes;
    for (int col = first; col < x.cols; col += step) {
      const int n = min(x.cols - col, kChunk);
      store_codes(codes + col, quantize(Eight<Element>(x, rows.left_out, row, col, n)), n);
    }
    if (rows.sums == nullptr) continue;
    sync_block();  // the codes of the row are read again
    const int lane = threadIdx.x % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    for (int g = static_cast<int>(threadIdx.x) / kWarp; g < rows.groups; g += warps) {
      int sum = 0;
      const int end = min((g + 1) * rows.group, x.cols);
      for (int col = g * rows.group + lane; col < end; col += kWarp)
        sum += static_cast<int8_t>(codes[col]);
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane == 0) rows.sums[int64_t{row} * rows.groups + g] = sum;
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kMaxTeam)
    float8_rows_kernel(const __grid_constant__ Float8Rows rows, int team) {
  TeamScratch& scratch = shared<TeamScratch>();
  const Blocks blocks{1, rows.group, rows.x.rows, rows.groups};
  const int teams = static_cast<int>(blockDim.x) / team;
  const int mine = static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) - mine * team;
  const int step = static_cast<int>(gridDim.x) * teams;
  for (int first = static_cast<int>(blockIdx.x) * teams; first < count(blocks); first += step) {
    const int index = first + mine;
    const Tile tile(rows.x, blocks, index);
    float scale = 0.0f;
    if (rows.scale == nullptr) {
      Range range;
      for (int chunk = lane; chunk < tile.chunks; chunk += team) {
        const auto at = tile.at(chunk);
        range.include(load_chunk<Element>(rows.x, at.row, at.col, at.n));
      }
      range = combine(range, team, scratch).finished();
      scale = symmetric_scale(range.absmax(), 448.0f, DType::kFloat32);
    } else if (tile.rows > 0) {
      scale = rows.scale[rows.experts.count == 0 ? 0 : expert_of(rows.experts, tile.row)];
    }
    if (lane == 0 && index < count(blocks)) {
      rows.scales[index / rows.groups * rows.scale_row_step +
                  index % rows.groups * rows.scale_group_step] = scale;
    }
    const float inverse = div_rn(1.0f, scale);
    for (int chunk = lane; chunk < tile.chunks; chunk += team) {
      const auto at = tile.at(chunk);
      const Chunk<Element> values = load_chunk<Element>(rows.x, at.row, at.col, at.n);
      Words2 codes = {};
#pragma unroll
      for (int i = 0; i < kChunk; i += 2) {
        codes.w[i / 4] |=
            narrow_float8_e4m3x2(mul_rn(values[i], inverse), mul_rn(values[i + 1], inverse))
            << (i % 4 * 8);
      }
      char* const target = static_cast<char*>(rows.data) + at.row * rows.row_bytes;
      if (rows.codes) {
        store_codes(reinterpret_cast<uint8_t*>(target) + at.col, codes, at.n);
        continue;
      }
      float decoded[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        decoded[i] = float8_e4m3_value(codes.w[i / 4] >> (i % 4 * 8) & 0xFFu);
      store_chunk<Float16>(reinterpret_cast<uint16_t*>(target) + at.col, decoded, at.n);
    }
  }
}

// What is left of a value after its upper 16 bits, as bf16 once more: three times makes all of it.
// An infinity or NaN is whole in the first.
__device__ inline float take_bfloat16(float& value) {
  const float upper = float_of(bits_of(value) & 0xFFFF0000u);
  const bool whole = !is_finite(value);
  const float taken = whole ? value : upper;
  value = whole ? 0.0f : sub_rn(value, upper);
  return taken;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    stage_rows_kernel(const __grid_constant__ StagedRows rows) {
  using Storage = typename Element::Storage;
  const Matrix& x = rows.x;
  for_each_chunk(x.rows, x.cols, [&](int row, int col, int n) {
    float values[kChunk];
    if (rows.perm == nullptr) {
      const Chunk<Element> chunk = load_chunk<Element>(x, row, col, n);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = chunk[i];
    } else {
      const int expert = rows.experts.count == 0 ? 0 : expert_of(rows.experts, row);
      const int32_t* const perm = rows.perm + int64_t{expert} * x.cols + col;
      const auto* const source = static_cast<const Storage*>(x.data) + row * x.row_stride;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int from = i < n ? perm[i] : 0;
        // A column that is not there cannot be refused here, but must not go unnoticed.
        values[i] = from < 0 || from >= x.cols ? float_of(0x7FC00000u)
                                               : load_number(source, x.dtype, from * x.col_stride);
      }
    }
    char* const target = static_cast<char*>(rows.data) + row * rows.row_bytes;
    if (rows.planes == 1) {
      store_chunk<Element>(reinterpret_cast<Storage*>(target) + col, values, n);
      return;
    }
    for (int plane = 0; plane < rows.planes; ++plane) {
      float part[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) part[i] = take_bfloat16(values[i]);
      store_chunk<BFloat16>(reinterpret_cast<uint16_t*>(target + plane * rows.plane_bytes) + col,
                            part, n);
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    stage_bytes_kernel(const __grid_constant__ StagedRows rows) {
  const Matrix& x = rows.x;
  for_each_chunk(x.rows, x.cols, [&](int row, int col, int n) {
    store_codes(static_cast<uint8_t*>(rows.data) + row * rows.row_bytes + col,
                load_codes(x, row, col, n), n);
  });
}

// Eight columns a thread, rows in strides of the block.
constexpr int kWideRows = 32;
struct WideScratch {
  int found[kThreads / kWideRows][kChunk];
};

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    wide_flags_kernel(Matrix x, float threshold, bool* left_out) {
  WideScratch& scratch = shared<WideScratch>();
  constexpr int kAcross = kThreads / kWideRows;
  const int across = static_cast<int>(threadIdx.x) % kAcross;
  const int down = static_cast<int>(threadIdx.x) / kAcross;
  const int step = static_cast<int>(gridDim.x) * kAcross * kChunk;
  for (int first = static_cast<int>(blockIdx.x) * kAcross * kChunk; first < x.cols; first += step) {
    if (down == 0) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) scratch.found[across][i] = 0;
    }
    sync_block();
    const int col = first + across * kChunk, n = min(x.cols - col, kChunk);
    if (n > 0) {
      for (int row = down; row < x.rows; row += kWideRows) {
        const Chunk<Element> values = load_chunk<Element>(x, row, col, n);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (float_of(bits_of(values[i]) & 0x7FFFFFFFu) >= threshold)
            atomic_or(&scratch.found[across][i], 1);
        }
      }
    }
    sync_block();
    if (down == 0) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (i < n) left_out[col + i] = scratch.found[across][i] != 0;
      }
    }
    sync_block();
  }
}

// One warp makes the list: there are few.
__global__ void __launch_bounds__(kWarp)
    wide_list_kernel(int cols, const bool* left_out, int32_t* count, int32_t* columns) {
  const int lane = threadIdx.x;
  int found = 0;
  for (int first = 0; first < cols; first += kWarp) {
    const int mine = first + lane < cols && left_out[first + lane] ? 1 : 0;
    int until = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = shuffle_from(until, lane - step < 0 ? lane : lane - step);
      if (lane >= step) until += other;
    }
    if (mine != 0) columns[found + until - 1] = first + lane;
    found += shuffle_from(until, kWarp - 1);
  }
  if (lane == 0) *count = found;
}

__global__ void __launch_bounds__(kThreads)
    scale_of_experts_kernel(const float* of_rows, int rows, Experts experts, float divisor,
                            float* scale) {
  TeamScratch& scratch = shared<TeamScratch>();
  for (int e = static_cast<int>(blockIdx.x); e < experts.count; e += static_cast<int>(gridDim.x)) {
    const int begin = row_bound(experts, e, rows), end = row_bound(experts, e + 1, rows);
    Range range;
    for (int row = begin + static_cast<int>(threadIdx.x); row < end; row += kThreads)
      range.include(Range{of_rows[row], of_rows[row]});
    range = combine(range, kThreads, scratch).finished();
    if (threadIdx.x == 0) scale[e] = symmetric_scale(range.absmax(), divisor, DType::kFloat32);
  }
}

// Whole warps for a row of so many columns.
int team_of_row(int cols) {
  const int team = team_for(ceil_div(cols, kChunk));
  return team < kWarp ? kWarp : team;
}

}  // namespace

cudaError_t int8_rows(const Int8Rows& rows, cudaStream_t stream) {
  return with_element(rows.x.dtype, [&](auto element) {
    return launch(int8_rows_kernel<decltype(element)>, dim3(grid_extent(rows.x.rows)),
                  dim3(static_cast<unsigned>(team_of_row(rows.x.cols))), sizeof(TeamScratch),
                  stream, rows);
  });
}

cudaError_t float8_rows(const Float8Rows& rows, cudaStream_t stream) {
  return with_element(rows.x.dtype, [&](auto element) {
    const int team = team_for(ceil_div(rows.group, kChunk));
    const int threads = team > kWarp ? team : kThreads;
    const int64_t teams = ceil_div(int64_t{rows.x.rows} * rows.groups, threads / team);
    return launch(float8_rows_kernel<decltype(element)>, dim3(grid_extent(teams)),
                  dim3(static_cast<unsigned>(threads)), sizeof(TeamScratch), stream, rows, team);
  });
}

cudaError_t stage_rows(const StagedRows& rows, cudaStream_t stream) {
  const ChunkGrid over = chunk_grid(rows.x.rows, rows.x.cols);
  if (rows.x.dtype == DType::kInt8)
    return launch(stage_bytes_kernel, over.grid, over.block, 0, stream, rows);
  return with_element(rows.x.dtype, [&](auto element) {
    return launch(stage_rows_kernel<decltype(element)>, over.grid, over.block, 0, stream, rows);
  });
}

cudaError_t find_wide_columns(const Matrix& x, float threshold, bool* left_out, int32_t* count,
                              int32_t* columns, cudaStream_t stream) {
  const int64_t blocks = ceil_div(x.cols, kThreads / kWideRows * kChunk);
  const cudaError_t status = with_element(x.dtype, [&](auto element) {
    return launch(wide_flags_kernel<decltype(element)>, dim3(grid_extent(blocks)), dim3(kThreads),
                  sizeof(WideScratch), stream, x, threshold, left_out);
  });
  if (status != cudaSuccess) return status;
  return launch(wide_list_kernel, dim3(1), dim3(kWarp), 0, stream, x.cols, left_out, count,
                columns);
}

cudaError_t scale_of_experts(const float* of_rows, int rows, const Experts& experts, float divisor,
                             float* scale, cudaStream_t stream) {
  return launch(scale_of_experts_kernel, dim3(grid_extent(experts.count)), dim3(kThreads),
                sizeof(TeamScratch), stream, of_rows, rows, experts, divisor, scale);
}

}  // namespace qk::cuda
