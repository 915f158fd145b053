// sage_attention and attention on CUDA.
#include "ops/attention_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

Tensor run(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
           const OptionalTensor& starts, const OptionalTensor& lengths, AttentionHow how) {
  check_attention(op, q, k, v, how.causal, scale, starts, lengths, how.window, kMaxHeadSize);
  const HeadRows queries = head_rows(op, "q", q), keys = head_rows(op, "k", k),
                 values = head_rows(op, "v", v);
  set_bounds(op, how, scale, starts, lengths);
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), size = q.size(3);
  const int64_t key_count = k.size(2);
  check_extent(op, "q", batch * heads * tokens, size);
  check_extent(op, "k", batch * k.size(1) * (key_count + kAttentionPad), size);

  const auto guard = use_device_of(q);
  const Tensor out = new_tensor(q, {batch, tokens, heads, size}, q.scalar_type());
  const Tensor view = torch::stable::transpose(out, 1, 2);
  if (q.numel() == 0) return view;
  if (key_count == 0) {
    torch::stable::zero_(const_cast<Tensor&>(out));
    return view;
  }
  const AttentionShape shape{static_cast<int>(batch),     static_cast<int>(heads),
                             static_cast<int>(k.size(1)), static_cast<int>(tokens),
                             static_cast<int>(key_count), static_cast<int>(size)};
  const int64_t items = batch * k.size(1), padded = shape.padded();
  const auto bytes = [&](int64_t each) { return new_tensor(q, {items * each}, ScalarType::Byte); };
  const auto floats = [&](int64_t each) {
    return new_tensor(q, {items * each}, ScalarType::Float);
  };
  const Tensor packed_keys = bytes(padded * size * (how.codes ? 1 : 2));
  const Tensor packed_values = bytes(padded * size * (how.int8_values ? 1 : 2));
  const Tensor key_scale = floats(padded), value_scale = floats(size), mean = floats(size);
  const Tensor before = new_tensor(q, {items * (padded + 1)}, ScalarType::Int);
  const Tensor partial = floats(int64_t{shape.chunks()} * 2 * size), bad = bytes(padded);
  const AttentionPacked packed{data<void>(packed_keys), data<void>(packed_values),
                               data<float>(key_scale),  data<float>(value_scale),
                               data<float>(mean),       data<int>(before),
                               data<float>(partial),    data<uint8_t>(bad)};
  const cudaStream_t stream = current_stream(q);
  check_launch(op, pack_keys(shape, keys, values, how, packed, stream));
  check_launch(op, attend(shape, queries, how, packed, out.mutable_data_ptr(), stream));
  return view;
}

Tensor sage_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale,
                      const OptionalTensor& starts, const OptionalTensor& lengths, int64_t window,
                      bool smooth_k, bool per_token, int64_t pv) {
  constexpr auto kOp = "sage_attention";
  check(pv == 0 || pv == 1, kOp, "pv must be 0 (16 bit) or 1 (int8), got ", pv);
  return run(kOp, q, k, v, scale, starts, lengths,
             {true, smooth_k, per_token, pv == 1, causal, window, 0.0f, nullptr, nullptr});
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale,
                 const OptionalTensor& starts, const OptionalTensor& lengths, int64_t window) {
  return run("attention", q, k, v, scale, starts, lengths,
             {false, false, true, false, causal, window, 0.0f, nullptr, nullptr});
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("sage_attention", TORCH_BOX(&qk::cuda::ops::sage_attention));
  m.impl("attention", TORCH_BOX(&qk::cuda::ops::attention));
}
