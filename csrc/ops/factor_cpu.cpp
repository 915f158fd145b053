// gptq_factor on the CPU.
#include "cpu/factor.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

constexpr auto kOp = "gptq_factor";
constexpr int64_t kBlock = 96;    // a multiple of every instruction set's width
constexpr int64_t kSmall = 1024;  // up to here, matrices of a batch are a thread's work each

struct Problem {
  const float* g;
  int64_t stride, n;
  double damp;
  float* out;
};

// The factor transposed, in stripes of its rows: those of a block have columns from the block's
// first one on, since there is nothing before.
struct Stripes {
  float* memory;
  int64_t padded, width;

  float* at(int64_t stripe, int64_t k) const {
    const int64_t block = stripe * width / kBlock, begin = block * kBlock;
    return memory + before(block) + (stripe * width - begin) * (padded - begin) +
           (k - begin) * width;
  }
  // From one stripe of the block that begins there to the next.
  int64_t apart(int64_t begin) const { return (padded - begin) * width; }
  int64_t size() const {
    const int64_t last = (padded - 1) / kBlock, rows = padded - last * kBlock;
    return before(last) + rows * rows;
  }

 private:
  int64_t before(int64_t block) const {
    return kBlock * (block * padded - kBlock * (block * (block - 1) / 2));
  }
};

// One step: columns [begin, end) of the factor, those right of them being known. A diagonal block
// `h`, and the stripes of rows above it. Rows are lanes: what is kept is the factor transposed.
class Step {
 public:
  Step(const Problem& problem, const Stripes& stripes, int64_t begin, int64_t end)
      : problem_(problem),
        kernels_(factor_kernels()),
        stripes_(stripes),
        begin_(begin),
        end_(end),
        rows_(end - begin),
        width_(kernels_.width),
        diagonals_(rows_ / width_),
        above_(begin / width_),
        pending_(diagonals_),
        h_(rows_ * rows_),
        inverse_(rows_ * rows_) {}

  // Whether the damped matrix is positive definite; if not, done() says how far it is.
  bool run() {
    // The diagonal first: whoever ends it factors it, while the others go on.
    parallel_queue(diagonals_ + above_, [&](int64_t i) {
      if (i < diagonals_) {
        sum_diagonal(i);
      } else {
        sum(begin_, i - diagonals_, r(i - diagonals_, begin_));
      }
    });
    if (done_ != rows_) return false;
    // Rows of the diagonal block have zeros before it, in memory that is new to the system.
    parallel_queue(diagonals_ + above_, [&](int64_t i) {
      if (i < diagonals_) {
        finish_diagonal(begin_ + i * width_);
      } else {
        finish(i - diagonals_);
      }
    });
    return true;
  }
  int64_t done() const { return done_; }

 private:
  float* r(int64_t stripe, int64_t k) const { return stripes_.at(stripe, k); }

  // The sum of products with what is right of here, minus g, for rows [row, end) and a stripe.
  void sum(int64_t row, int64_t stripe, float* x) {
    const Problem& p = problem_;
    const int64_t col = stripe * width_;
    const bool inside = row < p.n && col < p.n;
    const int64_t depth = stripes_.padded - end_;
    kernels_.product(r(row / width_, end_), stripes_.apart(begin_), r(stripe, end_), depth,
                     end_ - row, inside ? p.g + row * p.stride + col : nullptr, p.stride, p.n - row,
                     p.n - col, x);
  }

  void sum_diagonal(int64_t i) {
    const int64_t first = i * width_, stripe = begin_ / width_ + i;
    std::vector<float> x((rows_ - first) * width_);
    sum(begin_ + first, stripe, x.data());
    for (int64_t row = first; row < rows_; ++row) {
      for (int64_t c = 0; c < width_; ++c) {
        h_[row * rows_ + first + c] = -x[(row - first) * width_ + c];
      }
    }
    if (--pending_ > 0) return;
    for (int64_t row = 0; row < rows_; ++row) {
      double& d = h_[row * rows_ + row];
      d += problem_.damp;
      // A dead column is tied to no other one, and one beyond the last to none either: any positive
      // number will do.
      if (begin_ + row >= problem_.n ||
          problem_.g[(begin_ + row) * (problem_.stride + 1)] + problem_.damp == 0.0) {
        d = 1.0;
      }
    }
    std::vector<double> inverse(rows_ * rows_);
    done_ = kernels_.diagonal(h_.data(), rows_, inverse.data());
    for (int64_t i = 0; i < rows_ * rows_; ++i) inverse_[i] = static_cast<float>(inverse[i]);
  }

  void finish_diagonal(int64_t first) {
    for (int64_t row = first; row < std::min(first + width_, problem_.n); ++row) {
      float* const out = problem_.out + row * problem_.n;
      std::fill(out, out + row, 0.0f);
      for (int64_t k = row; k < std::min(end_, problem_.n); ++k) {
        out[k] = static_cast<float>(h_[(k - begin_) * rows_ + row - begin_]);
      }
    }
  }

  void finish(int64_t stripe) {
    const int64_t n = problem_.n;
    kernels_.triangle(inverse_.data(), rows_, r(stripe, begin_));
    kernels_.turn(r(stripe, begin_), std::min(end_, n) - begin_,
                  problem_.out + stripe * width_ * n + begin_, n);
  }

  const Problem problem_;
  const FactorKernels& kernels_;
  const Stripes stripes_;
  const int64_t begin_, end_, rows_, width_;
  const int64_t diagonals_, above_;
  std::atomic<int64_t> pending_;
  int64_t done_ = 0;
  std::vector<double> h_;
  std::vector<float> inverse_;
};

// 0, or the minor, counted from the last row, that is not positive.
int64_t factor(const Tensor& g, const Problem& problem) {
  const int64_t width = factor_kernels().width, padded = (problem.n + width - 1) / width * width;
  Stripes stripes = {nullptr, padded, width};
  Tensor memory = output(g, {stripes.size()}, ScalarType::Float);
  stripes.memory = data<float>(memory);
  for (int64_t end = padded; end > 0;) {
    const int64_t begin = (end - 1) / kBlock * kBlock;
    Step step(problem, stripes, begin, end);
    if (!step.run()) return problem.n - end + step.done() + 1;
    end = begin;
  }
  return 0;
}

}  // namespace

std::tuple<Tensor, Tensor> gptq_factor(const Tensor& g, double dampening) {
  const int64_t dim = g.dim(), n = dim >= 2 ? g.size(-1) : 0;
  check((dim == 2 || dim == 3) && g.size(-2) == n && g.scalar_type() == ScalarType::Float, kOp,
        "g must be float32 [K, K] or [B, K, K], got ", name_of(g.scalar_type()), " ",
        text_of(g.sizes()));
  check(dampening >= 0, kOp, "dampening must be >= 0, got ", dampening);
  check_rows(kOp, "g", g);
  const int64_t batch = dim == 3 ? g.size(0) : 1;
  const std::vector<int64_t> shape(g.sizes().begin(), g.sizes().end());
  Tensor out = output(g, shape, ScalarType::Float);
  Tensor dead =
      torch::stable::new_empty(g, IntList(shape.data(), shape.size() - 1), ScalarType::Bool);
  if (n == 0 || batch == 0) return {out, dead};
  const auto name = [&](int64_t b) { return dim == 3 ? "g[" + std::to_string(b) + "]" : "g"; };

  std::vector<Problem> problems(batch);
  for (int64_t b = 0; b < batch; ++b) {
    Problem& p = problems[b];
    p = {reinterpret_cast<const float*>(element(g, dim == 3 ? b * g.stride(0) : 0)), g.stride(-2),
         n, 0.0, data<float>(out) + b * n * n};
    int64_t bad = 0, first = 0;
    double sum = 0.0;
    for (int64_t c = n - 1; c >= 0; --c) {
      const float d = p.g[c * (p.stride + 1)];
      if (!(d >= 0.0f && std::isfinite(d))) ++bad, first = c;
      sum += d;
      data<bool>(dead)[b * n + c] = d == 0.0f;
    }
    check(bad == 0, kOp, bad, " of ", n, " diagonal elements of ", name(b),
          " are NaN, infinite or negative, the first at column ", first,
          ": look for NaN in the activations");
    p.damp = dampening * sum / static_cast<double>(n);
  }

  current_isa();
  std::vector<int64_t> minors(batch);
  const auto solve = [&](int64_t b) { minors[b] = factor(g, problems[b]); };
  if (n <= kSmall) {
    parallel_queue(batch, solve);
  } else {
    for (int64_t b = 0; b < batch; ++b) solve(b);
  }
  for (int64_t b = 0; b < batch; ++b) {
    check(minors[b] == 0, kOp, name(b), " + ", dampening, " * mean(diag(", name(b),
          ")) is not positive definite (minor ", minors[b], " of ", n,
          "): raise the dampening, or give more calibration tokens");
  }
  return {out, dead};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("gptq_factor", TORCH_BOX(&qk::cpu::gptq_factor));
}
