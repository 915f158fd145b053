// The table of fp8_gemm.h for one ISA: its file says how words of codes are decoded to pairs of
// bf16 (PairCodes), where it has units for them.
#include <numeric>

#include "cpu/fp8_gemm.h"
#include "cpu/panel_gemm.inl"
#include "cpu/rtn_impl.h"

namespace qk::QK_ISA {
namespace {

// Where the i-th code of a word is.
constexpr int shift_of(int i) { return i % 2 * 16 + i / 2 * 8; }

// fp32 of 16 columns' codes, NaN aside. An exponent of 2^120 more makes normal numbers of all
// codes: the right ones where v >= 2^-6, and 2^-7 (1 + m / 8) for the subnormal ones, m / 8 * 2^-6,
// which are 2 v - 2^-6: less than v there, and not less elsewhere.
struct FloatCodes {
  using Words = FloatWords;
  static constexpr int kStep = 4;
  static constexpr bool kPlain = false;
  template <int i>
  QK_INLINE F32 at(I32 packed) const {
    const I32 code = shift_left<24 - shift_of(i)>(packed);
    const I32 size = shift_right<4>(code) & broadcast(0x07f00000);
    const F32 v = from_bits(size + broadcast(120 << 23));
    const F32 exact = min(v, multiply_add(v, broadcast(2.0f), broadcast(-0x1p-6f)));
    return from_bits(bits(exact) | (code & broadcast(INT32_MIN)));
  }
};

// ---- scales of the weight ----

const float* nan_of(const Fp8Weight& weight, int64_t panel) {
  const uint8_t* const end = weight.packed + (panel + 1) * fp8_panel_bytes(weight.cols);
  return reinterpret_cast<const float*>(end) - kPanelCols;
}

// Those of a panel's columns in block column `block`: NaN where a column holds one.
inline void panel_scales(const Fp8Weight& weight, int64_t panel, int64_t block, float* out) {
  const float *const scale = weight.scale + block, *const nan = nan_of(weight, panel);
  const int64_t first = panel * kPanelCols, end = std::min(weight.rows, first + kPanelCols);
  if (first / weight.block_rows == (end - 1) / weight.block_rows) {
    const F32 s = broadcast(scale[first / weight.block_rows * weight.scale_cols]);
    for (int64_t c = 0; c < kPanelCols; c += kLanes)
      store(out + c, s + load(nan + c, Full{}), Full{});
    return;
  }
  for (int64_t n = first; n < end;) {
    const int64_t row = n / weight.block_rows, stop = std::min(end, (row + 1) * weight.block_rows);
    for (; n < stop; ++n) out[n - first] = scale[row * weight.scale_cols] + nan[n - first];
  }
  for (int64_t n = end; n < first + kPanelCols; ++n) out[n - first] = 0.0f;
}

// Scales multiply the sums of segments.
template <bool kScaled>
struct ScaledSegments {
  static constexpr bool kOffset = false, kInside = false, kRowScale = kScaled;
  const Fp8Weight& weight;
  int64_t size;
  void fill(int64_t panel, int64_t first, int64_t count, float* scale, float*) const {
    int64_t filled = -1;
    for (int64_t g = first; g < first + count; ++g, scale += kPanelCols) {
      const int64_t block = weight.block_cols >= weight.cols ? 0 : g * size / weight.block_cols;
      if (block == filled) {
        std::copy_n(scale - kPanelCols, kPanelCols, scale);
      } else {
        panel_scales(weight, panel, block, scale);
      }
      filled = block;
    }
  }
};

// Scales multiply decoded weights.
struct ScaledCodes {
  static constexpr bool kOffset = false, kInside = true, kRowScale = false;
  const Fp8Weight& weight;
  int64_t size;
  void fill(int64_t, int64_t, int64_t count, float* scale, float*) const {
    std::fill_n(scale, count * kPanelCols, 1.0f);
  }
  void apply(int64_t panel, int64_t k, int64_t count, float* decoded) const {
    alignas(64) float scale[kPanelCols];
    int64_t filled = -1;
    for (int64_t i = k; i < std::min(weight.cols, k + count); ++i, decoded += kPanelCols) {
      const int64_t block = i / weight.block_cols;
      if (block != filled) panel_scales(weight, panel, block, scale);
      filled = block;
      for (int64_t c = 0; c < kPanelCols; c += kLanes) {
        store(decoded + c, load(decoded + c, Full{}) * load(scale + c, Full{}), Full{});
      }
    }
  }
};

// ---- the product ----

Fp8Plan plan(const Fp8Weight& weight, const Fp8Quantizer& how, DType dtype) {
  const int64_t cols = weight.cols;
  const bool blocks = weight.block_cols < cols, groups = how.quantized && how.group < cols;
  Fp8Plan plan = {};
  plan.size = blocks && groups ? std::gcd(weight.block_cols, how.group)
              : blocks         ? weight.block_cols
              : groups         ? how.group
                               : fp8_steps(cols) * 4;
  plan.apart = plan.size % 4 != 0;
  if (plan.apart) plan.size = fp8_steps(cols) * 4;
  plan.groups = (cols + plan.size - 1) / plan.size;
  plan.scaled = how.quantized && !plan.apart;
#ifdef QK_PAIRS
  plan.pairs = !plan.apart && (how.quantized || dtype == DType::kBFloat16);
#else
  static_cast<void>(dtype);
#endif
  plan.depth = fp8_steps(cols) * (plan.pairs ? 2 : 4);
  return plan;
}

void gemm(const Fp8Plan& plan, const Fp8Weight& weight, const PackedRows& x, int64_t panel,
          int64_t first_tile, int64_t end_tile, const PanelOutput& out) {
  const auto* const packed =
      reinterpret_cast<const int32_t*>(weight.packed + panel * fp8_panel_bytes(weight.cols));
  const auto run = [&](auto decoder, const auto& groups) {
    panel_gemm(decoder, groups, x, packed, panel, first_tile, end_tile, out);
  };
#ifdef QK_PAIRS
  if (plan.pairs && plan.scaled) return run(PairCodes{}, ScaledSegments<true>{weight, plan.size});
  if (plan.pairs) return run(PairCodes{}, ScaledSegments<false>{weight, plan.size});
#else
  if (plan.scaled) return run(FloatCodes{}, ScaledSegments<true>{weight, plan.size});
#endif
  if (plan.apart) return run(FloatCodes{}, ScaledCodes{weight, plan.size});
  run(FloatCodes{}, ScaledSegments<false>{weight, plan.size});
}

// ---- x ----

// Codes of a row, and the scales of its groups.
template <class T>
void quantize_row(const Fp8Quantizer& how, const T* x, int64_t cols, uint8_t* codes, float* scales,
                  char* scratch) {
  const int64_t group = std::min(how.group, cols);
  if (how.scale) {
    scales[0] = *how.scale;
    return row_quantize_fp8<false>(x, static_cast<const T*>(nullptr), cols, cols, scales,
                                   Float8E4M3{}, codes);
  }
  const BlockRow row = {x, nullptr, cols, 1, cols, group, codes, cols, scales, nullptr};
  block_row_rtn_fp8<T>(Float8E4M3{}, row, scratch);
}

void pack_x(const Fp8Plan& plan, const Fp8Quantizer& how, const RowsInput& input,
            const PackedRows& x, int64_t t, char* room) {
  const int64_t cols = input.cols, padded = (cols + 2 * kLanes - 1) / kLanes * kLanes;
  const int64_t group = how.scale ? cols : std::min(how.group, cols);
  float* const row = reinterpret_cast<float*>(room);
  float* const scales = row + padded;
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scales + padded);
  char* const scratch = reinterpret_cast<char*>(codes + padded);
  const auto read = [&](int64_t r, float* out) {
    visit_float(input.dtype, [&]<class T>(T) {
      if (!how.quantized) return read_row<T>(input, r, out);
      const int64_t from = input.order ? input.order[r] : r;
      quantize_row(how, static_cast<const T*>(input.x) + from * input.stride, cols, codes, scales,
                   scratch);
    });
    if (!how.quantized) return;
    for_lanes(cols, [&](int64_t k, auto lanes) {
      store(out + k, decode(load_signed(codes + k, lanes), Float8E4M3{}), lanes);
    });
    if (plan.apart) {
      for (int64_t k = 0; k < cols; ++k) out[k] *= scales[k / group];
    } else {
      for (int64_t g = 0; g < plan.groups; ++g) {
        x.sums[r * plan.groups + g] = scales[g * plan.size / group];
      }
    }
  };
#ifdef QK_PAIRS
  if (plan.pairs) return pack_tile_of<PairWords>(x, cols, t, row, read);
#endif
  pack_tile_of<FloatWords>(x, cols, t, row, read);
}

}  // namespace

extern const Fp8Kernels fp8_gemm;
const Fp8Kernels fp8_gemm = {kTileRows, plan, pack_x, gemm};

}  // namespace qk::QK_ISA
