// What exp2.inl is on AVX-512.
#pragma once

#include "cpu/simd_avx512.h"

#define QK_EXP2

namespace qk::avx512 {
namespace {

// To 1.5e-7 of it: a polynomial on [0, 1), and the exponent by vscalefps, which takes the floor of
// x itself. 2^-inf is 0.
QK_INLINE F32 exp2(F32 x) {
  const __m512 f = _mm512_reduce_ps(x.v, 0x9);  // x - floor(x)
  F32 p = broadcast(0x1.e974fcp-10f);
  p = {_mm512_fmadd_ps(p.v, f, _mm512_set1_ps(0x1.277854p-7f))};
  p = {_mm512_fmadd_ps(p.v, f, _mm512_set1_ps(0x1.c91ce6p-5f))};
  p = {_mm512_fmadd_ps(p.v, f, _mm512_set1_ps(0x1.ebdb56p-3f))};
  p = {_mm512_fmadd_ps(p.v, f, _mm512_set1_ps(0x1.62e4bap-1f))};
  p = {_mm512_fmadd_ps(p.v, f, _mm512_set1_ps(1.0f))};
  return {_mm512_scalef_ps(p.v, x.v)};
}

}  // namespace
}  // namespace qk::avx512
