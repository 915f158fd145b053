// kv_append, kv_read and kv_attention on CUDA.
#include "cuda/common/kv_cache.h"

#include "ops/attention_cuda.h"
#include "ops/kv_cache_check.h"

namespace qk::cuda {
namespace ops {
namespace {

// A cache and its scale, which have been checked.
Cache cache_of(const char* op, const std::string& name, const Tensor& cache, const Tensor& scale) {
  check(on_device(cache), op, name, "_cache must be on a CUDA device");
  const int64_t batch = cache.size(0), heads = cache.size(1), capacity = cache.size(2);
  const bool by_token = scale.dim() == 3;
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
  check_append(kOp, k, v, k_cache, v_cache, k_scale, v_scale, positions);
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
  check_read(kOp, cache, scale, begin, end, dtype);
  const Cache from = cache_of(kOp, "kv", cache, scale);
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
  check_cache_attention(kOp, q, k_cache, v_cache, k_scale, v_scale, scale, starts, lengths, window,
                        kMaxHeadSize);
  const HeadRows queries = head_rows(kOp, "q", q);
  const Cache keys = cache_of(kOp, "k", k_cache, k_scale),
              values = cache_of(kOp, "v", v_cache, v_scale);
  AttentionHow how{false, false, false, false, causal, window, 0.0f, nullptr, nullptr};
  set_bounds(kOp, how, scale, starts, lengths);
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), size = q.size(3);
  check_extent(kOp, "q", batch * heads * tokens, size);
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
