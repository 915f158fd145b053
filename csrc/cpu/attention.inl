// The table of attention.h for one ISA.
#include "cpu/attention_impl.h"

namespace qk::QK_ISA {
namespace {

int64_t statistics(const AttentionKeys& keys, int64_t first, int64_t last, float* sums,
                   float* amax) {
  int64_t bad = 0;
  visit_float(keys.dtype,
              [&]<class T>(T) { bad = key_statistics<T>(keys, first, last, sums, amax); });
  return bad;
}

void pack(const AttentionKeys& keys, int64_t block, const float* mean, bool per_token,
          const AttentionPacked& packed, void* scratch) {
  const int64_t first = block * kKeyBlock;
  visit_float(keys.dtype, [&]<class T>(T) {
    for (int64_t j = first; j < first + kKeyBlock; j += kScaleBlock) {
      if (packed.key_scale) {
        pack_keys<T>(keys, j, mean, per_token, packed, static_cast<float*>(scratch));
      } else {
        pack_keys_16<T>(keys, j, packed, static_cast<float*>(scratch));
      }
    }
    if (packed.value_scale) {
      pack_values<Values8, T>(keys, first, packed);
    } else {
      pack_values<Values16, T>(keys, first, packed);
    }
  });
}

void attend(const AttentionQueries& queries, const AttentionPacked& packed, int64_t first,
            void* scratch) {
  Scratch s;
  float* at = static_cast<float*>(scratch);
  const auto take = [&at](int64_t n) {
    float* const part = at;
    at += (n + 15) / 16 * 16;
    return part;
  };
  s.queries = take(kQueryBlock * kMaxHeadSize);
  s.sums = take(kQueryBlock * queries.size);
  s.logits = take(kRows * kKeyBlock);
  s.weights = take(kRows * kKeyBlock);
  s.factor = take(kQueryBlock);
  s.peak = take(kQueryBlock);
  s.total = take(kQueryBlock);
  s.code_sum = reinterpret_cast<int32_t*>(take(kQueryBlock));
  s.bad = reinterpret_cast<uint8_t*>(take(kQueryBlock));
  visit_float(queries.dtype, [&]<class T>(T) {
    if (!packed.key_scale) {
      attend_block<Keys16, Values16, T>(queries, packed, first, s);
    } else if (packed.value_scale) {
      attend_block<Keys8, Values8, T>(queries, packed, first, s);
    } else {
      attend_block<Keys8, Values16, T>(queries, packed, first, s);
    }
  });
}

}  // namespace

extern const AttentionKernels attention;
const AttentionKernels attention = {
    {Keys8::kDepth, Keys16::kDepth}, {Values16::kDepth, Values8::kDepth}, statistics, pack, attend};

}  // namespace qk::QK_ISA
