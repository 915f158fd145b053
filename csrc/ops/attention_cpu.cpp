// sage_attention and attention on the CPU.
#include "cpu/attention.h"

#include "ops/attention_cpu.h"

namespace qk::cpu {
namespace {

constexpr int64_t kStatisticsKeys = 512;  // at a time: not by threads, so that sums are the same

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How products are made. Of `codes`, queries and keys are int8, else all is in 16 bit.
struct How {
  bool codes, smooth_k, per_token, int8_values;
};

// Keys and values of every head, packed. Item i of a tensor below is that of head i = batch row *
// heads + head.
struct Heads {
  DType dtype;
  const Tensor &k, &v;
  int64_t count, heads, tokens, size, blocks;
  Tensor keys, key_scale, values, value_scale, mean, bad;
  std::vector<int64_t> begin, end, bad_count;
  How how;

  AttentionKeys source(int64_t i) const {
    const int64_t b = i / heads, h = i % heads;
    return {dtype,
            element(k, b * k.stride(0) + h * k.stride(1)),
            k.stride(2),
            element(v, b * v.stride(0) + h * v.stride(1)),
            v.stride(2),
            size,
            begin[i],
            end[i],
            data<uint8_t>(bad) + i * tokens};
  }
  AttentionPacked packed(int64_t i) const {
    return {data<char>(keys) + i * keys.stride(0),
            how.codes ? data<float>(key_scale) + i * blocks * kKeyBlock : nullptr,
            data<char>(values) + i * values.stride(0),
            how.int8_values ? data<float>(value_scale) + i * size : nullptr,
            bad_count[i] ? data<uint8_t>(bad) + i * tokens : nullptr};
  }
};

// What has to be known of all keys before one is packed: their mean, the values' scales.
void take_statistics(Heads& heads) {
  const int64_t chunks = ceil_div(heads.tokens, kStatisticsKeys), size = heads.size;
  Tensor parts = empty(heads.k, {heads.count, chunks, 2, size}, ScalarType::Float);
  std::vector<int64_t> bad(heads.count * chunks);
  const auto part = [&](int64_t i) { return data<float>(parts) + i * 2 * size; };
  parallel_queue(heads.count * chunks, [&](int64_t i) {
    const int64_t head = i / chunks, first = i % chunks * kStatisticsKeys;
    const AttentionKeys keys = heads.source(head);
    bad[i] = attention_kernels().statistics(keys, std::max(first, keys.begin),
                                            std::min(first + kStatisticsKeys, keys.end), part(i),
                                            part(i) + size);
  });
  float* mean = data<float>(heads.mean);
  float* scale = data<float>(heads.value_scale);
  for (int64_t head = 0; head < heads.count; ++head, mean += size, scale += size) {
    int64_t& count = heads.bad_count[head];
    for (int64_t c = 0; c < chunks; ++c) count += bad[head * chunks + c];
    const int64_t keys = std::max<int64_t>(1, heads.end[head] - heads.begin[head] - count);
    for (int64_t d = 0; d < size; ++d) {
      float sum = 0.0f, amax = 0.0f;
      for (int64_t c = 0; c < chunks; ++c) {
        sum += part(head * chunks + c)[d];
        amax = std::max(amax, part(head * chunks + c)[size + d]);
      }
      mean[d] = heads.how.smooth_k ? sum / static_cast<float>(keys) : 0.0f;
      scale[d] = std::max(amax / 127.0f, 0x1p-100f);
    }
  }
}

Heads pack_heads(const char* op, const Tensor& k, const Tensor& v, const OptionalTensor& starts,
                 const OptionalTensor& lengths, How how) {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t batch = k.size(0), heads = k.size(1), tokens = k.size(2), size = k.size(3);
  const int64_t count = batch * heads, blocks = ceil_div(tokens, kKeyBlock);
  const int64_t elements = blocks * kKeyBlock * size;
  Heads result{
      dtype_of(op, k.scalar_type()),
      k,
      v,
      count,
      heads,
      tokens,
      size,
      blocks,
      output(k, {count, elements / kernels.key_depth[!how.codes] * 4}, ScalarType::Byte),
      empty(k, {count, blocks * kKeyBlock}, ScalarType::Float),
      output(k, {count, elements / kernels.value_depth[how.int8_values] * 4}, ScalarType::Byte),
      empty(k, {count, size}, ScalarType::Float),
      empty(k, {count, size}, ScalarType::Float),
      empty(k, {count, tokens}, ScalarType::Byte),
      std::vector<int64_t>(count),
      std::vector<int64_t>(count),
      std::vector<int64_t>(count),
      how};
  for (int64_t i = 0; i < count; ++i) {
    result.end[i] = std::clamp<int64_t>(bound_of(lengths, i / heads, tokens), 0, tokens);
    result.begin[i] = std::clamp<int64_t>(bound_of(starts, i / heads, 0), 0, result.end[i]);
  }
  take_statistics(result);
  parallel_queue_with_scratch(count * blocks, kPackScratchBytes, [&](int64_t i, void* scratch) {
    const int64_t head = i / blocks, block = i % blocks;
    if (block * kKeyBlock >= result.end[head]) return;  // nobody reads it
    kernels.pack(result.source(head), block, data<float>(result.mean) + head * size, how.per_token,
                 result.packed(head), scratch);
  });
  return result;
}

Tensor attend(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
              double scale, const OptionalTensor& starts, const OptionalTensor& lengths,
              int64_t window, How how) {
  check_attention(op, q, k, v, causal, scale, starts, lengths, window, kMaxHeadSize);
  const int64_t heads = q.size(1), tokens = q.size(2), size = q.size(3), keys = k.size(2);
  Tensor out = attention_output(q);
  if (q.numel() == 0) return out;
  if (keys == 0) return torch::stable::zero_(out);

  const Heads packed = pack_heads(op, k, v, starts, lengths, how);
  const int64_t blocks = ceil_div(tokens, kQueryBlock), group = heads / packed.heads;
  constexpr double kLog2E = 1.4426950408889634;
  // Query heads that share keys come after each other; later queries see more keys and go first.
  parallel_queue_with_scratch(
      packed.count * blocks * group, attention_scratch_bytes(size), [&](int64_t i, void* scratch) {
        const int64_t source = i / (blocks * group), block = blocks - 1 - i / group % blocks;
        const int64_t b = source / packed.heads, h = source % packed.heads * group + i % group;
        const AttentionQueries queries = {
            packed.dtype,
            element(q, b * q.stride(0) + h * q.stride(1)),
            q.stride(2),
            data<char>(out) +
                (b * out.stride(0) + h * out.stride(1)) * static_cast<int64_t>(out.element_size()),
            out.stride(2),
            size,
            tokens,
            packed.begin[source],
            packed.end[source],
            keys - tokens + 1,
            window ? window : int64_t{1} << 60,
            causal,
            static_cast<float>(scale * kLog2E),
            how.per_token};
        attention_kernels().attend(queries, packed.packed(source), block * kQueryBlock, scratch);
      });
  return out;
}

}  // namespace

Tensor sage_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale,
                      const OptionalTensor& starts, const OptionalTensor& lengths, int64_t window,
                      bool smooth_k, bool per_token, int64_t pv) {
  constexpr auto kOp = "sage_attention";
  check(pv == 0 || pv == 1, kOp, "pv must be 0 (16 bit) or 1 (int8), got ", pv);
  return attend(kOp, q, k, v, causal, scale, starts, lengths, window,
                {true, smooth_k, per_token, pv == 1});
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale,
                 const OptionalTensor& starts, const OptionalTensor& lengths, int64_t window) {
  return attend("attention", q, k, v, causal, scale, starts, lengths, window,
                {false, false, true, false});
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("sage_attention", TORCH_BOX(&qk::cpu::sage_attention));
  m.impl("attention", TORCH_BOX(&qk::cpu::attention));
}
