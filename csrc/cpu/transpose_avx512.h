// What transpose.inl is on AVX-512.
#pragma once

#include "cpu/simd_avx512.h"

#define QK_TRANSPOSE

namespace qk::avx512 {
namespace {

// out[i][j] = x[j][i] for 16 x 16 numbers: within groups of four by four, then the groups.
// The masks, of all lanes, keep GCC 12 from warning of undefined registers inside its intrinsics.
inline void transpose(const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(x + i * x_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_ps(0xffff, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_ps(0xffff, a[i], a[i + 1]);
  }
  // a[4 * i + j]: column j of each group of rows 4 * i...
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, low, high));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_maskz_shuffle_f32x4(0xffff, a[j], a[4 + j], 0x88);
    const __m512 odd = _mm512_maskz_shuffle_f32x4(0xffff, a[j], a[4 + j], 0xdd);
    const __m512 last_even = _mm512_maskz_shuffle_f32x4(0xffff, a[8 + j], a[12 + j], 0x88);
    const __m512 last_odd = _mm512_maskz_shuffle_f32x4(0xffff, a[8 + j], a[12 + j], 0xdd);
    float* const p = out + j * out_stride;
    _mm512_storeu_ps(p, _mm512_maskz_shuffle_f32x4(0xffff, even, last_even, 0x88));
    _mm512_storeu_ps(p + 4 * out_stride, _mm512_maskz_shuffle_f32x4(0xffff, odd, last_odd, 0x88));
    _mm512_storeu_ps(p + 8 * out_stride, _mm512_maskz_shuffle_f32x4(0xffff, even, last_even, 0xdd));
    _mm512_storeu_ps(p + 12 * out_stride, _mm512_maskz_shuffle_f32x4(0xffff, odd, last_odd, 0xdd));
  }
}

}  // namespace
}  // namespace qk::avx512
