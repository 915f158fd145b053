// QK_FAMILY(Kernels, family): defines family_kernels(), the family's table for the instruction set
// that dispatch.h chose.
#pragma once

#include "cpu/dispatch.h"

#if QUANTKIT_X86
#define QK_FAMILY(Kernels, family)    \
  namespace portable {                \
  extern const Kernels family;        \
  }                                   \
  namespace avx2 {                    \
  extern const Kernels family;        \
  }                                   \
  namespace avx512 {                  \
  extern const Kernels family;        \
  }                                   \
  const Kernels& family##_kernels() { \
    switch (current_isa()) {          \
      case Isa::avx512:               \
        return avx512::family;        \
      case Isa::avx2:                 \
        return avx2::family;          \
      case Isa::portable:             \
        break;                        \
    }                                 \
    return portable::family;          \
  }
#else
#define QK_FAMILY(Kernels, family)                                 \
  namespace portable {                                             \
  extern const Kernels family;                                     \
  }                                                                \
  const Kernels& family##_kernels() {                              \
    current_isa(); /* a forced one that is not here is an error */ \
    return portable::family;                                       \
  }
#endif
