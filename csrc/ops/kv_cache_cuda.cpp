// kv_append, kv_read and kv_attention on CUDA.
#include "cuda/common/kv_cache.h"

#include <string>

#include "ops/attention_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

// A cache [B, H, capacity, D] and its scale.
Cache cache_of(const char* op, const std::string& name, const Tensor& cache, const Tensor& scale) {
  check(cache.scalar_type() == ScalarType::Char || cache.scalar_type() == ScalarType::Float8_e4m3fn,
        op, name, "_cache must be int8 or float8_e4m3fn, got ", name_of(cache.scalar_type()));
  check(on_device(cache), op, name, "_cache must be on a CUDA device");
  check(cache.dim() == 4, op, name, "_cache must be 4-D [batch, heads, capacity, head size], got ",
        cache.dim(), "-D");
  qk::check_rows(op, (name + "_cache").c_str(), cache);
  const int64_t batch = cache.size(0), heads = cache.size(1), capacity = cache.size(2);
  const bool by_head = scale.dim() == 1 && (scale.size(0) == 1 || scale.size(0) == heads);
  const bool by_token = scale.dim() == 3 && scale.size(0) == batch && scale.size(1) == heads &&
                        scale.size(2) == capacity;
  check((by_head || by_token) && scale.scalar_type() == ScalarType::Float, op, name,
        "_scale must be torch.float32 [1], [", heads, "] for each head, or [", batch, ", ", heads,
        ", ", capacity, "] for each token, got ", name_of(scale.scalar_type()), " ",
        text_of(scale.sizes()));
  const float* steps = data_of<float>(op, (name + "_scale").c_str(), scale);
  check_extent(op, (name + "_cache").c_str(), batch * heads * capacity, cache.size(3));
  const int64_t by[3] = {by_token ? heads * capacity : 0,
                         by_token             ? capacity
                         : scale.size(0) == 1 ? 0
                                              : 1,
                         by_token ? 1 : 0};
  return {data<uint8_t>(cache),       dtype_of(op, cache.scalar_type()),
          static_cast<int>(capacity), {cache.stride(0), cache.stride(1), cache.stride(2)},
          const_cast<float*>(steps),  {by[0], by[1], by[2]}};
}

void kv_append(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& k_scale, const Tensor& v_scale, const Tensor& positions) {
  constexpr auto kOp = "kv_append";
  const struct {
    const char* name;
    const Tensor &x, &cache, &scale;
  } both[] = {{"k", k, k_cache, k_scale}, {"v", v, v_cache, v_scale}};
  for (const auto& [name, x, cache, scale] : both) {
    check_float(kOp, name, x);
    cache_of(kOp, name, cache, scale);
    const Shape expected = {cache.size(0), cache.size(1), positions.dim() ? positions.size(-1) : 0,
                            cache.size(3)};
    check(shape_of(x) == expected, kOp, name, " must be ",
          text_of({expected.data(), expected.size()}), " for this cache and these positions, got ",
          text_of(x.sizes()));
  }
  check(positions.scalar_type() == ScalarType::Long && positions.dim() == 2 &&
            positions.size(0) == k_cache.size(0),
        kOp, "positions must be torch.int64 [", k_cache.size(0), ", new tokens], got ",
        name_of(positions.scalar_type()), " ", text_of(positions.sizes()));
  check(on_device(positions), kOp, "positions must be on a CUDA device");
  const auto guard = use_device_of(k);
  int64_t strides[2] = {positions.stride(0), positions.stride(1)};
  for (const auto& [name, x, cache, scale] : both) {
    check(x.size(3) <= kMaxHeadSize && x.size(3) % 8 == 0, kOp,
          "the head size must be a multiple of 8, at most ", kMaxHeadSize, ", got ", x.size(3));
    check_launch(kOp,
                 cuda::kv_append(head_rows(kOp, name, x), cache_of(kOp, name, cache, scale),
                                 static_cast<const int64_t*>(positions.const_data_ptr()), strides,
                                 static_cast<int>(x.size(0)), static_cast<int>(x.size(1)),
                                 static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                                 scale.dim() == 3, current_stream(x)));
  }
}

Tensor kv_read(const Tensor& cache, const Tensor& scale, int64_t begin, int64_t end,
               ScalarType dtype) {
  constexpr auto kOp = "kv_read";
  const Cache from = cache_of(kOp, "kv", cache, scale);
  check(0 <= begin && begin <= end && end <= cache.size(2), kOp,
        "[begin, end) must lie within the capacity ", cache.size(2), ", got [", begin, ", ", end,
        ")");
  check(is_float(dtype), kOp, "dtype must be float32, float16 or bfloat16, got ", name_of(dtype));
  const int64_t batch = cache.size(0), heads = cache.size(1), size = cache.size(3);
  check(size % 8 == 0, kOp, "the head size must be a multiple of 8, got ", size);
  const auto guard = use_device_of(cache);
  const Tensor out = new_tensor(cache, {batch, heads, end - begin, size}, dtype);
  check_launch(kOp,
               cuda::kv_read(from, static_cast<int>(batch), static_cast<int>(heads),
                             static_cast<int>(begin), static_cast<int>(end), static_cast<int>(size),
                             dtype_of(kOp, dtype), out.mutable_data_ptr(), current_stream(cache)));
  return out;
}

Tensor kv_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& k_scale, const Tensor& v_scale, bool causal, double scale,
                    const OptionalTensor& starts, const OptionalTensor& lengths, int64_t window) {
  constexpr auto kOp = "kv_attention";
  check_float(kOp, "q", q);
  const HeadRows queries = head_rows(kOp, "q", q);
  const Cache keys = cache_of(kOp, "k", k_cache, k_scale),
              values = cache_of(kOp, "v", v_cache, v_scale);
  check_heads(kOp, q, k_cache, v_cache, "k_cache", "v_cache");
  check(v_cache.scalar_type() == k_cache.scalar_type(), kOp, "v_cache must be of k_cache's dtype ",
        name_of(k_cache.scalar_type()), ", got ", name_of(v_cache.scalar_type()));
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), size = q.size(3);
  AttentionHow how{false, false, false, false, causal, window, 0.0f, nullptr, nullptr};
  how.starts = bound_data(kOp, "starts", starts, batch);
  how.lengths = bound_data(kOp, "lengths", lengths, batch);
  check_softmax(kOp, scale, window);
  check_extent(kOp, "q", batch * heads * tokens, size);
  how.scale = static_cast<float>(scale * kLog2E);
  const auto guard = use_device_of(q);
  const Tensor out = new_tensor(q, {batch, tokens, heads, size}, q.scalar_type());
  const Tensor view = torch::stable::transpose(out, 1, 2);
  if (q.numel() == 0) return view;
  if (k_cache.size(2) == 0) {
    torch::stable::zero_(const_cast<Tensor&>(out));
    return view;
  }
  const AttentionShape shape{
      static_cast<int>(batch),  static_cast<int>(heads), static_cast<int>(k_cache.size(1)),
      static_cast<int>(tokens), keys.capacity,           static_cast<int>(size)};
  const Tensor partial = new_tensor(
      q, {batch * heads * tokens * kv_parts(keys.capacity) * (size + 2)}, ScalarType::Float);
  check_launch(kOp, cuda::kv_attention(shape, queries, how, keys, values, data<float>(partial),
                                       out.mutable_data_ptr(), current_stream(q)));
  return view;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("kv_append", TORCH_BOX(&qk::cuda::ops::kv_append));
  m.impl("kv_read", TORCH_BOX(&qk::cuda::ops::kv_read));
  m.impl("kv_attention", TORCH_BOX(&qk::cuda::ops::kv_attention));
}
