// Scales over histograms, in fp64 and by the steps of csrc/cpu/histogram_scale.cpp, which says what
// each method does; only the order of sums is another. First all of the device tries ranges (mse,
// eq) or thresholds (kl), then one block of threads chooses, or does the whole of what needs no
// trying.
#include "cuda/common/histogram_scale.h"

#include <cmath>

#include "cuda/common/histogram.h"
#include "cuda/common/intrinsics.h"
#include "cuda/common/launch.h"

namespace qk::cuda {
namespace {

constexpr int kHalf = kHistogramBins / 2;
constexpr int kRanges = 256;
constexpr int kBins = 2048, kMerged = kHalf / kBins;  // kl's
constexpr int kWarps = kThreads / kWarp;
static_assert(kBins + 1 == kHistogramLosses && kRanges <= kHistogramLosses);

__device__ double infinity() { return static_cast<double>(float_of(0x7F800000u)); }
__device__ double smaller(double a, double b) { return b < a ? b : a; }
__device__ double larger(double a, double b) { return a < b ? b : a; }
__device__ double between(double x, double low, double high) {
  return x < low ? low : high < x ? high : x;
}

struct Scale {
  double step;  // an fp32 number
  double zero_point;
};

__device__ double fp32_scale(double scale) {
  return larger(static_cast<double>(static_cast<float>(scale)), 0x1p-100);
}

__device__ Scale scale_of(double low, double high, const CodeRange& codes) {
  low = smaller(low, 0.0);
  high = larger(high, 0.0);
  if (codes.symmetric) return {fp32_scale(larger(high, -low) / codes.divisor), 0.0};
  const double scale = fp32_scale((high - low) / (codes.q_max - codes.q_min));
  const double zero = codes.q_min - rint(low / scale);
  return {scale, between(zero, codes.q_min, codes.q_max)};
}

// The histogram, with the exact extremes of what it counted.
struct Values {
  const int64_t* counts;
  double span, low, high;
  bool finite;

  __device__ Values(const int64_t* counts, const float* span, const float* range)
      : counts(counts),
        span(*span),
        low(smaller(range[0], 0.0)),
        high(larger(range[1], 0.0)),
        finite(is_finite(range[0]) && is_finite(range[1])) {}

  // A range that can be narrowed.
  __device__ bool wide() const { return finite && span > 0.0 && low != high; }
  __device__ double amax() const { return larger(high, -low); }
  // The power of two above amax.
  __device__ double unit() const {
    const uint64_t exponent = __builtin_bit_cast(uint64_t, amax()) >> 52;
    return __builtin_bit_cast(double, (exponent + 1) << 52);
  }
  // f(x, weight) for this thread's bins that hold something; x as a part of unit().
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    const double parts = unit(), width = span / kHalf;
    for (int i = threadIdx.x; i < kHistogramBins; i += kThreads) {
      if (counts[i] == 0) continue;
      const double middle = (i - kHalf + 0.5) * width;
      body(between(middle, low, high) / parts, static_cast<double>(counts[i]));
    }
  }
};

// The code of x, without its zero point.
struct Coder {
  __device__ Coder(const Scale& by, const CodeRange& codes, double unit)
      : step(by.step / unit),
        least(codes.q_min - by.zero_point),
        most(codes.q_max - by.zero_point) {}
  __device__ double operator()(double x) const { return rint(between(x / step, least, most)); }
  double step, least, most;
};

struct SumScratch {
  double warps[kWarps][2];
};

// Both sums over the block, in all threads.
__device__ void sum_block(double& a, double& b, SumScratch& scratch) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    a += shuffle_xor(a, mask);
    b += shuffle_xor(b, mask);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
    scratch.warps[warp][0] = a;
    scratch.warps[warp][1] = b;
  }
  sync_block();
  a = b = 0.0;
  for (int i = 0; i < kWarps; ++i) {
    a += scratch.warps[i][0];
    b += scratch.warps[i][1];
  }
  sync_block();  // scratch may be written again
}

// --- what is tried

__device__ Scale tried(const Values& values, int i, const CodeRange& codes) {
  const double part = static_cast<double>(kRanges - i) / kRanges;
  return scale_of(values.low * part, values.high * part, codes);
}

__global__ void __launch_bounds__(kThreads)
    ranges_kernel(const int64_t* counts, const float* span, const float* range, ScaleMethod method,
                  double norm, CodeRange codes, double* losses) {
  SumScratch& scratch = shared<SumScratch>();
  const Values values(counts, span, range);
  if (!values.wide()) return;
  for (int i = blockIdx.x; i < kRanges; i += static_cast<int>(gridDim.x)) {
    const Coder code(tried(values, i, codes), codes, values.unit());
    double sum = 0.0, dots = 0.0;
    if (method == ScaleMethod::kMse) {
      values.for_each([&](double x, double weight) {
        const double error = fabs(code(x) * code.step - x);
        sum += weight * (norm == 2.0 ? error * error : pow(error, norm));
      });
    } else {
      values.for_each([&](double x, double weight) {
        const double made = code(x) * code.step;
        sum += weight * made * made;
        dots += weight * made * x;
      });
    }
    sum_block(sum, dots, scratch);
    if (threadIdx.x != 0) continue;
    losses[i] = method == ScaleMethod::kMse ? sum : sum > 0.0 ? -dots / sqrt(sum) : 0.0;
  }
}

// Of the bins of magnitude before the i-th: how many values, how many bins that hold any, and the
// sum of p log p.
struct Leading {
  double mass[kBins + 1], entropy[kBins + 1];
  int filled[kBins + 1];
  double parts[kThreads];

  // sums[i + 1] = f(0) + ... + f(i).
  template <typename Number, typename Body>
  __device__ void add_up(Number* sums, const Body& f) {
    constexpr int kEach = kBins / kThreads;
    const int thread = static_cast<int>(threadIdx.x), first = thread * kEach;
    Number sum = 0;
    for (int i = 0; i < kEach; ++i) sum += f(first + i);
    parts[thread] = static_cast<double>(sum);
    sync_block();
    sum = 0;
    for (int i = 0; i < thread; ++i) sum += static_cast<Number>(parts[i]);
    if (thread == 0) sums[0] = 0;
    for (int i = 0; i < kEach; ++i) {
      sum += f(first + i);
      sums[first + i + 1] = sum;
    }
    sync_block();
  }
};

__device__ int64_t magnitudes(const int64_t* counts, int bin) {
  int64_t count = 0;
  for (int t = bin * kMerged; t < (bin + 1) * kMerged; ++t)
    count += counts[kHalf + t] + counts[kHalf - 1 - t];
  return count;
}

// The bins of kl that the largest magnitude reaches.
__device__ int last_threshold(const Values& values) {
  return static_cast<int>(smaller(kBins, floor(values.amax() / (values.span / kBins)) + 1));
}
__device__ int levels_of(const CodeRange& codes) { return (codes.q_max - codes.q_min + 1) / 2; }

// losses[i]: how far the distribution is from what codes make of it if i bins are kept.
__global__ void __launch_bounds__(kThreads, 1)
    thresholds_kernel(const int64_t* counts, const float* span, const float* range, CodeRange codes,
                      double* losses) {
  Leading& leading = shared<Leading>();
  const Values values(counts, span, range);
  if (!values.wide()) return;
  leading.add_up(leading.mass, [&](int i) { return static_cast<double>(magnitudes(counts, i)); });
  leading.add_up(leading.filled, [&](int i) { return magnitudes(counts, i) > 0 ? 1 : 0; });
  const double* const mass = leading.mass;
  const double total = mass[kBins], rare = 0.5 / total;
  const auto term = [&](double count) {
    return count > 0.0 ? count / total * log(count / total) : 0.0;
  };
  leading.add_up(leading.entropy, [&](int i) { return term(mass[i + 1] - mass[i]); });

  const int levels = levels_of(codes), end = last_threshold(values);
  for (int i = min(levels, end) + static_cast<int>(blockIdx.x * kThreads + threadIdx.x); i <= end;
       i += static_cast<int>(gridDim.x) * kThreads) {
    if (mass[i] == 0.0) {
      losses[i] = infinity();
      continue;
    }
    const double clipped = total - mass[i], last = mass[i] - mass[i - 1];
    double sum = leading.entropy[i - 1] + term(last + clipped);
    for (int g = 0; g < levels; ++g) {
      const int begin = (g * i + levels - 1) / levels, stop = ((g + 1) * i + levels - 1) / levels;
      const double count = mass[stop] - mass[begin];
      if (count == 0.0) continue;
      const double alike = leading.filled[stop] - leading.filled[begin];
      const double q = larger(count / alike / mass[i], rare);
      sum -= (count + (stop == i && last > 0.0 ? clipped : 0.0)) / total * log(q);
    }
    // What is clipped fell on an empty bin: as if half a value had been there.
    if (last == 0.0) sum -= clipped / total * log(rare);
    losses[i] = sum;
  }
}

// --- what is chosen

struct ChooseScratch {
  SumScratch sums;
  double least[kThreads];
  int place[kThreads];
  int64_t counts[kThreads];
};

// Among losses[first .. last], of those within `slack(least)` of the least one the first, or the
// last; -1 if all are infinite. In all threads.
template <typename Slack>
__device__ int choose(const double* losses, int first, int last, bool backwards, const Slack& slack,
                      ChooseScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  double least = infinity();
  for (int i = first + thread; i <= last; i += kThreads) least = smaller(least, losses[i]);
  scratch.least[thread] = least;
  sync_block();
  for (int i = 0; i < kThreads; ++i) least = smaller(least, scratch.least[i]);
  if (least == infinity()) return -1;
  int best = backwards ? -1 : last + 1;
  for (int i = first + thread; i <= last; i += kThreads) {
    if (losses[i] <= slack(least)) best = backwards ? max(best, i) : min(best, i);
  }
  scratch.place[thread] = best;
  sync_block();
  for (int i = 0; i < kThreads; ++i)
    best = backwards ? max(best, scratch.place[i]) : min(best, scratch.place[i]);
  return best;
}

// How many bins, of so many, it takes to reach the wanted count. In all threads.
template <typename Count>
__device__ int edge_of(int bins, double wanted, const Count& count_of, ChooseScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x), each = bins / kThreads, first = thread * each;
  int64_t mine = 0;
  for (int i = 0; i < each; ++i) mine += count_of(first + i);
  scratch.counts[thread] = mine;
  sync_block();
  int64_t sum = 0;
  for (int i = 0; i < thread; ++i) sum += scratch.counts[i];
  int edge = bins;
  for (int i = each - 1; i >= 0; --i) {  // sum + mine: up to bin first + i
    if (static_cast<double>(sum + mine) >= wanted) edge = first + i + 1;
    mine -= count_of(first + i);
  }
  scratch.place[thread] = edge;
  sync_block();
  for (int i = 0; i < kThreads; ++i) edge = min(edge, scratch.place[i]);
  sync_block();  // scratch may be written again
  return edge;
}

__device__ Scale by_percentile(const Values& values, double total, double percentile,
                               const CodeRange& codes, ChooseScratch& scratch) {
  const int64_t* const c = values.counts;
  const double wanted = total * (percentile / 100), width = values.span / kHalf;
  double low, high;
  if (codes.symmetric) {
    const auto both = [&](int i) { return c[kHalf + i] + c[kHalf - 1 - i]; };
    high = width * edge_of(kHalf, wanted, both, scratch);
    low = -high;
  } else {
    const auto upwards = [&](int i) { return c[i]; };
    const auto downwards = [&](int i) { return c[kHistogramBins - 1 - i]; };
    high = width * (edge_of(kHistogramBins, wanted, upwards, scratch) - kHalf);
    low = -width * (edge_of(kHistogramBins, wanted, downwards, scratch) - kHalf);
  }
  return scale_of(larger(values.low, low), smaller(values.high, high), codes);
}

// Codes given the scale, the least-squares scale given the codes, until it stands.
__device__ Scale by_turns(const Values& values, const CodeRange& codes, SumScratch& scratch) {
  Scale found = scale_of(values.low, values.high, codes);
  for (int turn = 0; turn < 200; ++turn) {
    const Coder code(found, codes, values.unit());
    double dots = 0.0, squares = 0.0;
    values.for_each([&](double x, double weight) {
      const double c = code(x);
      dots += weight * c * x;
      squares += weight * c * c;
    });
    sum_block(dots, squares, scratch);
    const double fitted = dots / squares * values.unit();
    if (!is_finite(static_cast<float>(fitted)) || fp32_scale(fitted) == found.step) break;
    found.step = fp32_scale(fitted);
  }
  return found;
}

__global__ void __launch_bounds__(kThreads)
    choose_kernel(const int64_t* counts, const float* span, const float* range, ScaleMethod method,
                  double parameter, CodeRange codes, const double* losses, float* scale,
                  int8_t* zero_point) {
  ChooseScratch& scratch = shared<ChooseScratch>();
  const Values values(counts, span, range);
  int64_t mine = 0;
  double negative = 0.0;
  for (int i = threadIdx.x; i < kHistogramBins; i += kThreads) {
    mine += counts[i];
    if (counts[i] < 0) negative += 1.0;
  }
  scratch.counts[threadIdx.x] = mine;
  double unused = 0.0;
  sum_block(negative, unused, scratch.sums);  // a barrier besides
  int64_t total = 0;
  for (int i = 0; i < kThreads; ++i) total += scratch.counts[i];
  sync_block();  // scratch may be written again

  Scale found = scale_of(values.low, values.high, codes);
  if (total > 0 && values.wide()) {
    if (method == ScaleMethod::kPercentile) {
      found = by_percentile(values, static_cast<double>(total), parameter, codes, scratch);
    } else if (method == ScaleMethod::kKl) {
      const int end = last_threshold(values);
      const int best = choose(
          losses, min(levels_of(codes), end), end, true, [](double least) { return least + 1e-9; },
          scratch);
      const double kept =
          best < 0 ? values.amax() : smaller(values.amax(), best * (values.span / kBins));
      found = scale_of(larger(values.low, -kept), smaller(values.high, kept), codes);
    } else if (method == ScaleMethod::kAdmm) {
      found = by_turns(values, codes, scratch.sums);
    } else {
      const int best = choose(
          losses, 0, kRanges - 1, false, [](double least) { return least + 1e-12 * fabs(least); },
          scratch);
      found = tried(values, best < 0 ? 0 : best, codes);
    }
  }
  if (threadIdx.x != 0) return;
  const bool usable = values.finite && negative == 0.0;
  *scale = usable ? static_cast<float>(found.step) : float_of(0x7FC00000u);
  if (!codes.symmetric) *zero_point = usable ? static_cast<int8_t>(found.zero_point) : int8_t{0};
}

}  // namespace

cudaError_t histogram_scale(const int64_t* counts, const float* span, const float* range,
                            ScaleMethod method, double parameter, const CodeRange& codes,
                            double* workspace, float* scale, int8_t* zero_point,
                            cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (method == ScaleMethod::kMse || method == ScaleMethod::kEq) {
    status = launch(ranges_kernel, dim3(grid_extent(kRanges)), dim3(kThreads), sizeof(SumScratch),
                    stream, counts, span, range, method, parameter, codes, workspace);
  } else if (method == ScaleMethod::kKl) {
    status = launch(thresholds_kernel, dim3(grid_extent(kBins / kThreads)), dim3(kThreads),
                    sizeof(Leading), stream, counts, span, range, codes, workspace);
  }
  if (status != cudaSuccess) return status;
  return launch(choose_kernel, dim3(1), dim3(kThreads), sizeof(ChooseScratch), stream, counts, span,
                range, method, parameter, codes, workspace, scale, zero_point);
}

}  // namespace qk::cuda
