// kv_append and kv_read on the CPU.
#include "cpu/quantize.h"
#include "cpu/rtn.h"
#include "ops/kv_cache.h"

namespace qk::cpu {
namespace {

void append_token(const char* op, const Tensor& x, const Tensor& cache, const Tensor& scale,
                  int64_t b, int64_t h, int64_t t, int64_t place, void* scratch) {
  const int64_t size = x.size(3);
  const DType from = dtype_of(op, x.scalar_type()), to = dtype_of(op, cache.scalar_type());
  const char* const row = element(x, row_index(x, b, h, t));
  uint8_t* const codes = data<uint8_t>(cache) + row_index(cache, b, h, place);
  float* const step = data<float>(scale) + scale_index(cache, scale, b, h, place);
  if (scale.dim() == 3) {
    const BlockRow block = {row, nullptr, size, 1, size, size, codes, size, step, nullptr};
    if (to == DType::kInt8) {
      rtn_kernels().rtn_int(from, {-127, 127, true, 127.0f, DType::kFloat32, 0}, block, scratch);
    } else {
      rtn_kernels().rtn_fp8(from, to, block, scratch);
    }
    return;
  }
  const Rows rows = {row, size, size, 0, 1};
  const Scales scales = {step, nullptr, 1, 1, size};
  if (to == DType::kInt8) {
    quantize_kernels().quantize_int(from, rows, scales, -127, 127,
                                    reinterpret_cast<int8_t*>(codes));
  } else {
    quantize_kernels().quantize_fp8(from, rows, scales, to, codes);
  }
}

}  // namespace

void kv_append(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& k_scale, const Tensor& v_scale, const Tensor& positions) {
  constexpr auto kOp = "kv_append";
  const struct {
    const char* name;
    const Tensor &x, &cache, &scale;
  } both[] = {{"k", k, k_cache, k_scale}, {"v", v, v_cache, v_scale}};
  check_append(kOp, k, v, k_cache, v_cache, k_scale, v_scale, positions);
  if (k.numel() == 0 && v.numel() == 0) return;
  const int64_t batch = k.size(0), tokens = k.size(2);
  const auto place_of = [&](int64_t b, int64_t t) {
    return *reinterpret_cast<const int64_t*>(
        element(positions, b * positions.stride(0) + t * positions.stride(1)));
  };
  for (int64_t i = 0; i < batch * tokens; ++i) {
    const int64_t place = place_of(i / tokens, i % tokens);
    for (const auto& [name, x, cache, scale] : both) {
      check(place < cache.size(2), kOp, "positions must be below the capacity ", cache.size(2),
            ", got ", place);
    }
  }
  for (const auto& [name, x, cache, scale] : both) {
    if (x.numel() == 0) continue;
    const int64_t heads = x.size(1);
    // Structured bindings cannot be captured in C++20 by every compiler.
    const Tensor &from = x, &to = cache, &steps = scale;
    parallel_rows(batch * heads * tokens, x.size(3), [&](int64_t begin, int64_t end) {
      std::vector<char> scratch(rtn_scratch_bytes(from.size(3)));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (heads * tokens), h = i / tokens % heads, t = i % tokens;
        const int64_t place = place_of(b, t);
        if (place >= 0) append_token(kOp, from, to, steps, b, h, t, place, scratch.data());
      }
    });
  }
}

Tensor kv_read(const Tensor& cache, const Tensor& scale, int64_t begin, int64_t end,
               ScalarType dtype) {
  constexpr auto kOp = "kv_read";
  check_read(kOp, cache, scale, begin, end, dtype);
  const int64_t heads = cache.size(1), tokens = end - begin, size = cache.size(3);
  Tensor out = output(cache, {cache.size(0), heads, tokens, size}, dtype);
  if (out.numel() == 0) return out;
  const DType from = dtype_of(kOp, cache.scalar_type()), to = dtype_of(kOp, dtype);
  parallel_rows(cache.size(0) * heads * tokens, size, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / (heads * tokens), h = i / tokens % heads, place = begin + i % tokens;
      const Rows row = {element(cache, row_index(cache, b, h, place)), size, size, 0, 1};
      const Scales step = {data<float>(scale) + scale_index(cache, scale, b, h, place), nullptr, 1,
                           1, size};
      quantize_kernels().dequantize(
          from, row, step, to,
          data<char>(out) + i * size * static_cast<int64_t>(out.element_size()));
    }
  });
  return out;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&qk::cpu::kv_append));
  m.impl("kv_read", TORCH_BOX(&qk::cpu::kv_read));
}
