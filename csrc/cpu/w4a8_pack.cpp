// Packing for w4a8.h: once for a layer, so in plain C++.
#include <algorithm>
#include <cstring>

#include "cpu/w4a8.h"

namespace qk {
namespace {

// Four half-bytes, one to a byte.
uint32_t spread(uint32_t half) {
  return (half & 0xf) | (half & 0xf0) << 4 | (half & 0xf00) << 8 | (half & 0xf000) << 12;
}

template <class T>
void pack_columns(const void* values, int64_t rows, int64_t groups, int64_t first, void* packed) {
  const T* const from = static_cast<const T*>(values) + first * groups;
  T* const to = static_cast<T*>(packed) + first * groups;
  const int64_t count = std::min(kW4Panel, rows - first);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < kW4Panel; ++i) {
      to[g * kW4Panel + i] = i < count ? from[i * groups + g] : T{};
    }
  }
}

}  // namespace

void w4a8_pack(const uint32_t* words, int64_t stride, int64_t rows, int64_t cols, int64_t panel,
               uint32_t* packed) {
  const int64_t depth = w4a8_words(cols), first = panel * kW4Panel;
  uint32_t* const to = packed + first * depth;
  constexpr int64_t kBlock = 16;  // words: a cache line of each row
  for (int64_t k = 0; k < depth; k += kBlock) {
    const int64_t end = std::min(depth, k + kBlock);
    for (int64_t i = 0; i < kW4Panel; ++i) {
      const uint32_t* const from = first + i < rows ? words + (first + i) * stride : nullptr;
      for (int64_t j = k; j < end; ++j) {
        to[j * kW4Panel + i] =
            from ? spread(from[j] & 0xffff) | spread(from[j] >> 16) << 4 : uint32_t{0};
      }
    }
  }
}

void w4a8_pack_scales(const void* values, int64_t bytes, int64_t rows, int64_t groups,
                      int64_t panel, void* packed) {
  const int64_t first = panel * kW4Panel;
  if (bytes == 1) {
    pack_columns<uint8_t>(values, rows, groups, first, packed);
  } else if (bytes == 2) {
    pack_columns<uint16_t>(values, rows, groups, first, packed);
  } else {
    pack_columns<uint32_t>(values, rows, groups, first, packed);
  }
}

}  // namespace qk
