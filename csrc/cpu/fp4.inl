// The table of fp4.h for one ISA.
#include "cpu/fp4.h"
#include "cpu/numeric.inl"

namespace qk::QK_ISA {
namespace {

// The nibble of x in each lane.
QK_INLINE I32 nibble(F32 x) {
  const I32 code = encode<Float4E2M1, false>(x + broadcast(0.0f), Float4E2M1{});  // -0 becomes 0
  return select(is_nan(x), broadcast(0),
                (code & broadcast(7)) | shift_right<4>(code & broadcast(0x80)));
}

template <class T>
void row_quantize(const T* x, int64_t cols, int64_t group, const float* scale, uint8_t* q) {
  for_groups(cols, group, [&](int64_t g, int64_t first, int64_t n) {
    const F32 step = broadcast(scale[g]);  // divided by, as others do: a reciprocal moves ties
    for_lanes(n, [&](int64_t i, auto lanes) {
      alignas(kLanes) uint8_t nibbles[kLanes] = {};
      store_bytes(nibbles, nibble(load(x + first + i, lanes) / step), lanes);
      const int64_t count = n - i < kLanes ? n - i : kLanes;
      uint8_t* out = q + (first + i) / 2;
      for (int64_t j = 0; j < count / 2; ++j) {
        out[j] = static_cast<uint8_t>(nibbles[2 * j] | nibbles[2 * j + 1] << 4);
      }
    });
  });
}

void quantize_rows(DType dtype, Rows x, Scales grid, uint8_t* q) {
  visit_float(dtype, [&]<class T>(T) {
    for (int64_t r = x.begin; r < x.end; ++r) {
      row_quantize<T>(static_cast<const T*>(x.data) + r * x.stride, x.cols, grid.block_cols,
                      grid.scale + r * grid.cols, q + r * (x.cols / 2));
    }
  });
}

}  // namespace

extern const Fp4Kernels fp4;
const Fp4Kernels fp4 = {quantize_rows};

}  // namespace qk::QK_ISA
