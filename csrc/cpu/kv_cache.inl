// The table of kv_cache.h for one ISA.
#include "cpu/kv_cache_impl.h"

namespace qk::QK_ISA {
namespace {

bool rows_with_nan(const uint8_t* codes, int64_t stride, int64_t size, int64_t begin, int64_t end) {
  if (stride == size) return any_nan(codes + begin * stride, (end - begin) * size);
  for (int64_t j = begin; j < end; ++j) {
    if (any_nan(codes + j * stride, size)) return true;
  }
  return false;
}

void attend(const CacheHead& head, const float* q, int rows, float factor, int64_t begin,
            int64_t end, float* parts, int64_t part_stride) {
  if (head.format == DType::kInt8) {
    return attend_codes<FastCodes<int8_t>>(head, q, rows, factor, begin, end, parts, part_stride);
  }
  attend_codes<FastCodes<Float8E4M3>>(head, q, rows, factor, begin, end, parts, part_stride);
  // Looked for afterwards: the codes are in the cache then.
  if (kFastLosesNan && (rows_with_nan(head.k, head.k_stride, head.size, begin, end) ||
                        rows_with_nan(head.v, head.v_stride, head.size, begin, end))) {
    attend_codes<AnyCodes<Float8E4M3>>(head, q, rows, factor, begin, end, parts, part_stride);
  }
}

void merge(const float* parts, int64_t n, int64_t size, DType dtype, void* out) {
  visit_float(dtype, [&]<class T>(T) { merge_parts(parts, n, size, static_cast<T*>(out)); });
}

void widen_query(DType dtype, const void* q, int64_t size, float* out) {
  visit_float(dtype, [&]<class T>(T) {
    for (int64_t i = 0; i < size; i += kLanes) {
      store(out + i, load(static_cast<const T*>(q) + i, Full{}), Full{});
    }
  });
}

}  // namespace

extern const KvCacheKernels kv_cache;
const KvCacheKernels kv_cache = {attend, merge, widen_query};

}  // namespace qk::QK_ISA
