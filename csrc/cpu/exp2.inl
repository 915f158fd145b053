// 2^x for the softmax, unless the ISA's own file has done it.
#pragma once

#include "cpu/numeric.inl"

#ifndef QK_EXP2
namespace qk::QK_ISA {
namespace {

// To 1.7e-7 of it. -127 is where the exponent's bits end: 0, as for all x below.
QK_INLINE F32 exp2(F32 x) {
  x = max(broadcast(-127.0f), x);
  const I32 n = round(x);
  const F32 f = x - to_float(n);
  F32 p = broadcast(0x1.5bba14p-10f);
  p = multiply_add(p, f, broadcast(0x1.3cea88p-7f));
  p = multiply_add(p, f, broadcast(0x1.c6b752p-5f));
  p = multiply_add(p, f, broadcast(0x1.ebf9bcp-3f));
  p = multiply_add(p, f, broadcast(0x1.62e42ap-1f));
  p = multiply_add(p, f, broadcast(1.0f));
  return from_bits(bits(p) + shift_left<23>(n));
}

}  // namespace
}  // namespace qk::QK_ISA
#endif
