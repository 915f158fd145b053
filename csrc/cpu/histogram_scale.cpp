#include "cpu/histogram_scale.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/histogram.h"

namespace qk {
namespace {

constexpr int kHalf = kHistogramBins / 2;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double fp32_scale(double scale) {
  return std::max(static_cast<double>(static_cast<float>(scale)), 0x1p-100);
}

// To the nearest integer, ties to even, for |x| < 2^51: the addition does the rounding.
double round_to_even(double x) {
  constexpr double kMagic = 0x1.8p52;
  return x + kMagic - kMagic;
}

ScaleAndZero scale_of(double low, double high, const CodeRange& codes) {
  low = std::min(low, 0.0);
  high = std::max(high, 0.0);
  if (codes.symmetric) return {fp32_scale(std::max(high, -low) / codes.divisor), 0.0};
  const double scale = fp32_scale((high - low) / (codes.q_max - codes.q_min));
  const double zero = codes.q_min - std::nearbyint(low / scale);
  return {scale, std::clamp<double>(zero, codes.q_min, codes.q_max)};
}

// The code of x, without its zero point.
struct Coder {
  Coder(const ScaleAndZero& by, const CodeRange& codes, double unit)
      : step(by.scale / unit),
        least(codes.q_min - by.zero_point),
        most(codes.q_max - by.zero_point) {}
  double operator()(double x) const {
    return round_to_even(std::min(std::max(x / step, least), most));
  }
  double step, least, most;
};

// Middles of the bins that hold something, as parts of `unit`, a power of two, so that no power of
// an error overflows or vanishes.
struct Points {
  explicit Points(const HistogramValues& from) {
    unit = std::ldexp(1.0, std::ilogb(std::max(from.high, -from.low)) + 1);
    for (int i = 0; i < kHistogramBins; ++i) {
      if (from.counts[i] == 0) continue;
      const double middle = (i - kHalf + 0.5) * (from.span / kHalf);
      x.push_back(std::clamp(middle, from.low, from.high) / unit);
      weight.push_back(static_cast<double>(from.counts[i]));
    }
  }
  double unit;
  std::vector<double> x, weight;
};

double power_loss(const Points& points, const Coder& code, double norm) {
  double sum = 0.0;
  for (size_t i = 0; i < points.x.size(); ++i) {
    const double error = std::abs(code(points.x[i]) * code.step - points.x[i]);
    sum += points.weight[i] * (norm == 2.0 ? error * error : std::pow(error, norm));
  }
  return sum;
}

// Less the cosine between x and what it becomes, up to |x|, which all scales share.
double cosine_loss(const Points& points, const Coder& code) {
  double squares = 0.0, dots = 0.0;
  for (size_t i = 0; i < points.x.size(); ++i) {
    const double made = code(points.x[i]) * code.step;
    squares += points.weight[i] * made * made;
    dots += points.weight[i] * made * points.x[i];
  }
  return squares > 0.0 ? -dots / std::sqrt(squares) : 0.0;
}

// The widest of the ranges whose loss is the least, but for roundings of its sum.
ScaleAndZero by_ranges(const HistogramValues& values, ScaleMethod method, double norm,
                       const CodeRange& codes) {
  constexpr int kSteps = 256;
  const Points points(values);
  double losses[kSteps], least = kInfinity;
  const auto tried = [&](int i) {
    const double part = static_cast<double>(kSteps - i) / kSteps;
    return scale_of(values.low * part, values.high * part, codes);
  };
  for (int i = 0; i < kSteps; ++i) {
    const Coder code(tried(i), codes, points.unit);
    losses[i] =
        method == ScaleMethod::kMse ? power_loss(points, code, norm) : cosine_loss(points, code);
    least = std::min(least, losses[i]);
  }
  int best = 0;
  while (losses[best] > least + 1e-12 * std::abs(least)) ++best;
  return tried(best);
}

// Codes given the scale, the least-squares scale given the codes, until it stands.
ScaleAndZero by_turns(const HistogramValues& values, const CodeRange& codes) {
  const Points points(values);
  ScaleAndZero found = scale_of(values.low, values.high, codes);
  for (int turn = 0; turn < 200; ++turn) {
    const Coder code(found, codes, points.unit);
    double dots = 0.0, squares = 0.0;
    for (size_t i = 0; i < points.x.size(); ++i) {
      const double c = code(points.x[i]);
      dots += points.weight[i] * c * points.x[i];
      squares += points.weight[i] * c * c;
    }
    const double fitted = dots / squares * points.unit;
    if (!std::isfinite(static_cast<float>(fitted)) || fp32_scale(fitted) == found.scale) break;
    found.scale = fp32_scale(fitted);
  }
  return found;
}

// Upper edge, in bins, of the first bin that reaches the wanted count.
template <class Count>
int edge_of(int bins, double wanted, const Count& count) {
  int64_t sum = 0;
  for (int i = 0; i < bins; ++i) {
    sum += count(i);
    if (static_cast<double>(sum) >= wanted) return i + 1;
  }
  return bins;
}

ScaleAndZero by_percentile(const HistogramValues& values, double percentile,
                           const CodeRange& codes) {
  const int64_t* const c = values.counts;
  const double wanted =
      static_cast<double>(std::accumulate(c, c + kHistogramBins, int64_t{0})) * (percentile / 100);
  const double width = values.span / kHalf;
  double low, high;
  if (codes.symmetric) {
    high = width * edge_of(kHalf, wanted, [&](int i) { return c[kHalf + i] + c[kHalf - 1 - i]; });
    low = -high;
  } else {
    high = width * (edge_of(kHistogramBins, wanted, [&](int i) { return c[i]; }) - kHalf);
    low =
        -width *
        (edge_of(kHistogramBins, wanted, [&](int i) { return c[kHistogramBins - 1 - i]; }) - kHalf);
  }
  return scale_of(std::max(values.low, low), std::min(values.high, high), codes);
}

// The threshold that keeps the distribution of magnitudes closest to what so many codes make of it
// (Migacz, 8-bit Inference with TensorRT, 2017). sum p log(p / q) is taken apart: sum p log p is
// one of leading bins, and q is alike within a code, so that each threshold costs a logarithm a
// code.
double kl_threshold(const HistogramValues& values, int levels) {
  constexpr int kBins = 2048, kMerged = kHalf / kBins;
  const double width = values.span / kBins, amax = std::max(values.high, -values.low);
  // Of the bins before the i-th: how many values, how many bins that hold any.
  std::vector<double> mass(kBins + 1), filled(kBins + 1), entropy(kBins + 1);
  for (int i = 0; i < kBins; ++i) {
    int64_t count = 0;
    for (int t = i * kMerged; t < (i + 1) * kMerged; ++t) {
      count += values.counts[kHalf + t] + values.counts[kHalf - 1 - t];
    }
    mass[i + 1] = mass[i] + static_cast<double>(count);
    filled[i + 1] = filled[i] + (count > 0 ? 1.0 : 0.0);
  }
  const double total = mass[kBins], rare = 0.5 / total;
  const auto term = [&](double count) {
    return count > 0 ? count / total * std::log(count / total) : 0.0;
  };
  for (int i = 0; i < kBins; ++i) entropy[i + 1] = entropy[i] + term(mass[i + 1] - mass[i]);

  const int end = static_cast<int>(std::min<double>(kBins, std::floor(amax / width) + 1));
  const int first = std::min(levels, end);
  std::vector<double> divergence(end + 1, kInfinity);
  double least = kInfinity;
  for (int i = first; i <= end; ++i) {
    if (mass[i] == 0.0) continue;
    const double clipped = total - mass[i], last = mass[i] - mass[i - 1];
    double sum = entropy[i - 1] + term(last + clipped);
    for (int g = 0; g < levels; ++g) {
      const int begin = (g * i + levels - 1) / levels, stop = ((g + 1) * i + levels - 1) / levels;
      const double count = mass[stop] - mass[begin], alike = filled[stop] - filled[begin];
      if (count == 0.0) continue;
      const double q = std::max(count / alike / mass[i], rare);
      sum -= (count + (stop == i && last > 0.0 ? clipped : 0.0)) / total * std::log(q);
    }
    // What is clipped fell on an empty bin: as if half a value had been there.
    if (last == 0.0) sum -= clipped / total * std::log(rare);
    divergence[i] = sum;
    least = std::min(least, sum);
  }
  if (least == kInfinity) return amax;
  int best = end;  // the widest one of equals, but for roundings
  while (divergence[best] > least + 1e-9) --best;
  return std::min(amax, best * width);
}

}  // namespace

ScaleAndZero histogram_scale(const HistogramValues& values, ScaleMethod method, double parameter,
                             const CodeRange& codes) {
  const int64_t* const c = values.counts;
  const bool nothing = std::all_of(c, c + kHistogramBins, [](int64_t count) { return count == 0; });
  if (nothing || values.span == 0.0 || values.low == values.high) {
    return scale_of(values.low, values.high, codes);
  }
  switch (method) {
    case ScaleMethod::kPercentile:
      return by_percentile(values, parameter, codes);
    case ScaleMethod::kKl: {
      const double threshold = kl_threshold(values, (codes.q_max - codes.q_min + 1) / 2);
      return scale_of(std::max(values.low, -threshold), std::min(values.high, threshold), codes);
    }
    case ScaleMethod::kAdmm:
      return by_turns(values, codes);
    default:
      return by_ranges(values, method, parameter, codes);
  }
}

}  // namespace qk
