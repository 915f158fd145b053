// kv_append, kv_read and kv_attention on the CPU.
#include "cpu/kv_cache.h"

#include "cpu/quantize.h"
#include "cpu/rtn.h"
#include "ops/attention_check.h"

namespace qk::cpu {
namespace {

// A cache [B, H, capacity, D] and its scale.
void check_cache(const char* op, const std::string& name, const Tensor& cache,
                 const Tensor& scale) {
  check(cache.scalar_type() == ScalarType::Char || cache.scalar_type() == ScalarType::Float8_e4m3fn,
        op, name, "_cache must be int8 or float8_e4m3fn, got ", name_of(cache.scalar_type()));
  check(cache.dim() == 4, op, name, "_cache must be 4-D [batch, heads, capacity, head size], got ",
        cache.dim(), "-D");
  check_rows(op, (name + "_cache").c_str(), cache);
  const int64_t batch = cache.size(0), heads = cache.size(1), capacity = cache.size(2);
  const bool by_head = scale.dim() == 1 && (scale.size(0) == 1 || scale.size(0) == heads);
  const bool by_token = scale.dim() == 3 && scale.size(0) == batch && scale.size(1) == heads &&
                        scale.size(2) == capacity;
  check((by_head || by_token) && scale.scalar_type() == ScalarType::Float, op, name,
        "_scale must be torch.float32 [1], [", heads, "] for each head, or [", batch, ", ", heads,
        ", ", capacity, "] for each token, got ", name_of(scale.scalar_type()), " ",
        text_of(scale.sizes()));
  check(scale.is_contiguous(), op, name, "_scale must be contiguous, got strides ",
        text_of(scale.strides()));
}

// Where the scale of a token is, of contiguous [1], [H] or [B, H, capacity].
int64_t scale_index(const Tensor& cache, const Tensor& scale, int64_t b, int64_t h, int64_t place) {
  if (scale.dim() == 1) return scale.size(0) == 1 ? 0 : h;
  return (b * cache.size(1) + h) * cache.size(2) + place;
}

int64_t row_index(const Tensor& x, int64_t b, int64_t h, int64_t t) {
  return b * x.stride(0) + h * x.stride(1) + t * x.stride(2);
}

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
  for (const auto& [name, x, cache, scale] : both) {
    check_float(kOp, name, x);
    check_cache(kOp, name, cache, scale);
    const int64_t expected[] = {cache.size(0), cache.size(1),
                                positions.dim() ? positions.size(-1) : 0, cache.size(3)};
    bool same = x.dim() == 4;
    for (int64_t d = 0; same && d < 4; ++d) same = x.size(d) == expected[d];
    check(same, kOp, name, " must be ", text_of({expected, 4}),
          " for this cache and these positions, got ", text_of(x.sizes()));
    check_rows(kOp, name, x);
  }
  check(positions.scalar_type() == ScalarType::Long && positions.dim() == 2 &&
            positions.size(0) == k_cache.size(0),
        kOp, "positions must be torch.int64 [", k_cache.size(0), ", new tokens], got ",
        name_of(positions.scalar_type()), " ", text_of(positions.sizes()));
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
  check_cache(kOp, "kv", cache, scale);
  check(0 <= begin && begin <= end && end <= cache.size(2), kOp,
        "[begin, end) must lie within the capacity ", cache.size(2), ", got [", begin, ", ", end,
        ")");
  check(is_float(dtype), kOp, "dtype must be float32, float16 or bfloat16, got ", name_of(dtype));
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

Tensor kv_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& k_scale, const Tensor& v_scale, bool causal, double scale,
                    const OptionalTensor& starts, const OptionalTensor& lengths, int64_t window) {
  constexpr auto kOp = "kv_attention";
  check_heads(kOp, q, k_cache, v_cache, "k_cache", "v_cache", kMaxCacheHeadSize);
  check_cache(kOp, "k", k_cache, k_scale);
  check_cache(kOp, "v", v_cache, v_scale);
  check(v_cache.scalar_type() == k_cache.scalar_type(), kOp, "v_cache must be of k_cache's dtype ",
        name_of(k_cache.scalar_type()), ", got ", name_of(v_cache.scalar_type()));
  check_bounds(kOp, q.size(0), starts, lengths);
  check_softmax(kOp, scale, window);
  Tensor out = attention_output(q);
  if (q.numel() == 0) return out;

  const int64_t batch = q.size(0), tokens = q.size(2), size = q.size(3);
  const int64_t kv_heads = k_cache.size(1), capacity = k_cache.size(2);
  const int64_t group = q.size(1) / kv_heads, rows = tokens * group, heads = batch * kv_heads;
  // Keys [begin, end) that token t of batch row b sees.
  const auto seen = [&](int64_t b, int64_t t) {
    const int64_t length = bound_of(lengths, b, capacity), position = length - tokens + t;
    const int64_t end = std::min(capacity, causal ? std::min(length, position + 1) : length);
    const int64_t begin = std::max(bound_of(starts, b, 0), window ? position - window + 1 : 0);
    return std::pair{std::max<int64_t>(begin, 0), std::max<int64_t>(end, 0)};
  };
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) most = std::max(most, seen(b, tokens - 1).second);
  const int64_t chunks = (most + kCacheChunk - 1) / kCacheChunk, stride = kCacheSums + size;
  Tensor wide = empty(q, {heads, rows, size}, ScalarType::Float);
  Tensor parts = output(q, {heads, rows, chunks, stride}, ScalarType::Float);
  const KvCacheKernels& kernels = kv_cache_kernels();
  const DType dtype = dtype_of(kOp, q.scalar_type());
  // Row i of `wide`: query heads that share keys lie side by side.
  const auto place = [&](const Tensor& x, int64_t i) {
    const int64_t head = i / rows, t = i % rows / group, g = i % group;
    return row_index(x, head / kv_heads, head % kv_heads * group + g, t);
  };
  parallel_rows(heads * rows, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.widen(dtype, element(q, place(q, i)), size, data<float>(wide) + i * size);
    }
  });

  constexpr double kLog2E = 1.4426950408889634;
  parallel_queue(heads * chunks, [&](int64_t i) {
    const int64_t head = i / chunks, chunk = i % chunks, b = head / kv_heads, h = head % kv_heads;
    const CacheHead source = {dtype_of(kOp, k_cache.scalar_type()),
                              data<uint8_t>(k_cache) + row_index(k_cache, b, h, 0),
                              data<uint8_t>(v_cache) + row_index(v_cache, b, h, 0),
                              k_cache.stride(2),
                              v_cache.stride(2),
                              data<float>(k_scale) + scale_index(k_cache, k_scale, b, h, 0),
                              data<float>(v_scale) + scale_index(v_cache, v_scale, b, h, 0),
                              k_scale.dim() == 3,
                              v_scale.dim() == 3,
                              size};
    for (int64_t row = 0; row < rows;) {
      const int count = static_cast<int>(std::min<int64_t>(kCacheRows, group - row % group));
      const auto [first, last] = seen(b, row / group);
      const int64_t begin = std::max(first, chunk * kCacheChunk);
      const int64_t end = std::min(last, (chunk + 1) * kCacheChunk);
      if (begin < end) {
        kernels.attend(source, data<float>(wide) + (head * rows + row) * size, count,
                       static_cast<float>(scale * kLog2E), begin, end,
                       data<float>(parts) + ((head * rows + row) * chunks + chunk) * stride,
                       chunks * stride);
      }
      row += count;
    }
  });
  parallel_rows(heads * rows, chunks * size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, last] = seen(i / rows / kv_heads, i % rows / group);
      const int64_t from = first / kCacheChunk, to = (last + kCacheChunk - 1) / kCacheChunk;
      kernels.merge(data<float>(parts) + (i * chunks + from) * stride, first < last ? to - from : 0,
                    size, dtype,
                    data<char>(out) + place(out, i) * static_cast<int64_t>(out.element_size()));
    }
  });
  return out;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&qk::cpu::kv_append));
  m.impl("kv_read", TORCH_BOX(&qk::cpu::kv_read));
  m.impl("kv_attention", TORCH_BOX(&qk::cpu::kv_attention));
}
