// kv_attention on the CPU.
#include "cpu/kv_cache.h"

#include "ops/kv_cache.h"

namespace qk::cpu {

Tensor kv_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& k_scale, const Tensor& v_scale, bool causal, double scale,
                    const OptionalTensor& starts, const OptionalTensor& lengths, int64_t window) {
  constexpr auto kOp = "kv_attention";
  check_cache_attention(kOp, q, k_cache, v_cache, k_scale, v_scale, scale, starts, lengths, window,
                        kMaxCacheHeadSize);
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
  m.impl("kv_attention", TORCH_BOX(&qk::cpu::kv_attention));
}
