// The upper R with R R^T = h: blocks of columns from the last one on, each of which takes all
// columns right of it in one product. R is kept transposed, in stripes of its rows:
// [stripe][column][width].
#pragma once

#include <cstdint>

namespace qk {

struct FactorKernels {
  int width;   // of a stripe
  int height;  // rows of a block are a multiple of it, and so is the width
  // x[i][width] = sum of a[k][i] * b[k][width], k in [0, depth), - start[i][width], for `rows` i's.
  // a has the rows of one block, `a_stripe` numbers from one stripe to the next. Of start, which
  // may be null, there are `start_rows` rows and `start_cols` columns, zeros beyond.
  void (*product)(const float* a, int64_t a_stripe, const float* b, int64_t depth, int64_t rows,
                  const float* start, int64_t start_stride, int64_t start_rows, int64_t start_cols,
                  float* x);
  // x[i][width] = - sum of inverse[k][i] * x[k][width], k in [i, n), in place.
  void (*triangle)(const float* inverse, int64_t n, float* x);
  // out[i * stride + k] = x[k][width]'s number i, k in [0, rows).
  void (*turn)(const float* x, int64_t rows, float* out, int64_t stride);
  // h [n][n], of which the lower half is read, becomes the lower L with L^T L = h, and `inverse`
  // gets L^-1, also lower. In fp64: what is lost here is lost for all rows above. The number of
  // columns that worked out, from the last one on: all n unless h is not positive definite.
  int64_t (*diagonal)(double* h, int64_t n, double* inverse);
};

// Those of the instruction set that dispatch.h chose.
const FactorKernels& factor_kernels();

}  // namespace qk
