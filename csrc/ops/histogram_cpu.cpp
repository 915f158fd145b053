// histogram_accumulate on the CPU. Every thread counts into a histogram of its own, which widens as
// values ask for it: the bins of a span are unions of those of half the span, so when and where it
// widened leaves no trace in the sum of all.
#include "cpu/histogram.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "cpu/reduce.h"
#include "ops/cpu_ops.h"
#include "ops/histogram_check.h"

namespace qk::cpu {
namespace {

constexpr auto kOp = "histogram_accumulate";
constexpr int kHalf = kHistogramBins / 2;
constexpr int64_t kPiece = 8192;  // values: their extreme is found, then they are counted, in cache

// Spans whose reciprocal, times the bins, is an fp32 number.
constexpr float kLeastSpan = 0x1p-100f, kMostSpan = 0x1p127f;

// How many times `span` must double to be `wider`; nothing but zeros has no span to double.
int doublings(float span, float wider) {
  return span == 0.0f ? 0 : std::ilogb(wider) - std::ilogb(span);
}

// Adds to `into` the counts of a span that doubles so many times.
void add(const int64_t* counts, int doublings, int64_t* into) {
  const int shift = std::min(doublings, 30);
  for (int t = 0; t < kHalf; ++t) {
    into[kHalf + (t >> shift)] += counts[kHalf + t];
    into[kHalf - 1 - (t >> shift)] += counts[kHalf - 1 - t];
  }
}

struct Histogram {
  explicit Histogram(float span)
      : span(span), counts(kHistogramBins), even(kHistogramBins), odd(kHistogramBins) {}

  void include(DType dtype, const void* x, int64_t n) {
    float most = 0.0f;
    reduce_kernels().absmax(dtype, x, n, 1, n, n, nullptr, &most);
    if (!(most < kMostSpan)) {
      finite = false;
      return;
    }
    if (most > 0.0f && most >= span)
      widen(std::max(kLeastSpan, std::ldexp(1.0f, std::ilogb(most) + 1)));
    if (uncounted + n > UINT32_MAX) flush();
    uncounted += n;
    histogram_kernels().count(dtype, x, n, span > 0.0f ? kHalf / span : 0.0f, even.data(),
                              odd.data());
  }

  void widen(float wider) {
    flush();
    std::vector<int64_t> merged(kHistogramBins);
    add(counts.data(), doublings(span, wider), merged.data());
    counts = std::move(merged);
    span = wider;
  }

  void flush() {
    for (int i = 0; i < kHistogramBins; ++i) counts[i] += int64_t{even[i]} + odd[i];
    std::fill(even.begin(), even.end(), 0);
    std::fill(odd.begin(), odd.end(), 0);
    uncounted = 0;
  }

  float span;
  bool finite = true;
  std::vector<int64_t> counts;

 private:
  std::vector<uint32_t> even, odd;
  int64_t uncounted = 0;  // values in the two
};

}  // namespace

void histogram_accumulate(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& counts,
                          const Tensor& span) {
  check(x.dim() == 2, kOp, "x must be 2-D [tokens, columns], got ", x.dim(), "-D");
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check_accumulate(kOp, x, mask, counts, span);
  const int64_t rows = x.size(0), cols = x.size(1), total = rows * cols;
  if (total == 0) return;
  const DType dtype = dtype_of(kOp, x.scalar_type());
  float& old = *data<float>(span);
  // Without gaps or a mask, x is one long row: short rows cost more than long ones.
  const bool dense = !mask && (x.stride(0) == cols || rows == 1);
  const int64_t length = dense ? kPiece : cols,
                items = dense ? (total + kPiece - 1) / kPiece : rows;
  std::mutex mutex;
  std::vector<Histogram> parts;
  parallel_rows(items, length, [&](int64_t begin, int64_t end) {
    Histogram part(old);
    for (int64_t i = begin; i < end && part.finite; ++i) {
      if (mask && !*reinterpret_cast<const bool*>(element(*mask, i * mask->stride(0)))) continue;
      const int64_t first = dense ? i * kPiece : i * x.stride(0);
      const int64_t last = dense ? std::min(first + kPiece, total) : first + cols;
      for (int64_t at = first; at < last; at += kPiece) {
        part.include(dtype, element(x, at), std::min(kPiece, last - at));
      }
    }
    part.flush();
    const std::lock_guard lock(mutex);
    parts.push_back(std::move(part));
  });
  Histogram sum(old);
  std::copy_n(data<int64_t>(counts), kHistogramBins, sum.counts.begin());
  for (const Histogram& part : parts) {
    check(part.finite, kOp, "x must be finite and below 2^127");
    if (part.span > sum.span) sum.widen(part.span);
  }
  for (const Histogram& part : parts) {
    add(part.counts.data(), doublings(part.span, sum.span), sum.counts.data());
  }
  std::copy(sum.counts.begin(), sum.counts.end(), data<int64_t>(counts));
  old = sum.span;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("histogram_accumulate", TORCH_BOX(&qk::cpu::histogram_accumulate));
}
