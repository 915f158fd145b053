// The CPU ops, as functions that other ops call, and how work is spread over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pages.h"
#include "ops/check.h"

namespace qk::cpu {

using Block = std::vector<int64_t>;

Tensor absmax(const Tensor& x, const Block& block);
std::tuple<Tensor, Tensor> minmax(const Tensor& x, const Block& block);
Tensor symmetric_scale(const Tensor& amax, double divisor, ScalarType scale_dtype);
std::tuple<Tensor, Tensor> asymmetric_scale(const Tensor& x_min, const Tensor& x_max, int64_t q_min,
                                            int64_t q_max, ScalarType scale_dtype);
Tensor quantize_int(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                    const Block& block, int64_t q_min, int64_t q_max);
Tensor quantize_fp8(const Tensor& x, const Tensor& scale, const Block& block, ScalarType dtype);
Tensor pack_int32(const Tensor& codes, int64_t num_bits);

// f(begin, end) over rows of `cols` elements; a thread gets no fewer than are worth waking it for.
template <typename Body>
void parallel_rows(int64_t rows, int64_t cols, const Body& body) {
  constexpr int64_t kElements = 32768;
  current_isa();  // a wrong QUANTKIT_ISA is said here; thrown in the loop, torch would lose the
                  // words
  torch::stable::parallel_for(0, rows, cols >= kElements ? 1 : kElements / (cols + 1) + 1, body);
}

// f(worker, i) for i in [0, n), each taken by the next thread that is free, in this order: for work
// in uneven pieces. Inside another parallel loop it runs in the calling thread. No two at a time
// have the same worker, a number below `workers(n)`: what it keeps between pieces is its own.
inline int64_t workers(int64_t n) { return std::min<int64_t>(n, torch::stable::get_num_threads()); }
template <typename Body>
void parallel_workers(int64_t n, const Body& body) {
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, workers(n), 1, [&](int64_t worker, int64_t) {
    for (int64_t i = next++; i < n; i = next++) body(worker, i);
  });
}
template <typename Body>
void parallel_queue(int64_t n, const Body& body) {
  parallel_workers(n, [&](int64_t, int64_t i) { body(i); });
}

// f(i, thread) for i in [0, first), and when all of these are done, g(i, next, thread) for i in
// [0, second): a thread takes neighbours one after the other, so that what they read is one stream,
// and when its share is done helps with those of others. `next` is what it will most likely take
// after i, second if nothing. Before all that a thread calls soon(i) for what it will take first.
// One parallel region for both, on at most `threads` threads, since waking them costs as much as a
// small product. A thread waits only for pieces that another one is at work on, so fewer threads
// than asked for are no harm. f must not throw.
template <typename Soon, typename First, typename Second>
void parallel_stages(int64_t threads, const Soon& soon, int64_t first, const First& f,
                     int64_t second, const Second& g) {
  current_isa();
  threads = std::max<int64_t>(1, std::min<int64_t>(threads, torch::stable::get_num_threads()));
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = second * t / threads;
    shares[t].end = second * (t + 1) / threads;
  }
  std::atomic<int64_t> begun = 0, done = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    const int64_t start = second * thread / threads;
    if (start < shares[thread].end) soon(start);
    int64_t count = 0;
    for (int64_t i = begun++; i < first; i = begun++, ++count) f(i, thread);
    done.fetch_add(count, std::memory_order_release);
    for (int spins = 0; done.load(std::memory_order_acquire) < first; ++spins) {
      if (spins >= 4096) std::this_thread::yield();
    }
    for (int64_t t = 0; t < threads; ++t) {
      Share& share = shares[(thread + t) % threads];
      for (int64_t i = share.next++; i < share.end; i = share.next++) {
        g(i, i + 1 < share.end ? i + 1 : second, thread);
      }
    }
  });
}

// The same where there is nothing to do beforehand.
template <typename First, typename Second>
void parallel_stages(int64_t threads, int64_t first, const First& f, int64_t second,
                     const Second& g) {
  parallel_stages(threads, [](int64_t) {}, first, f, second, g);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// An uninitialised output that may be large.
inline Tensor output(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(x, shape, dtype);
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

// Element `index` of a tensor that is only read.
inline const char* element(const Tensor& tensor, int64_t index) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         index * static_cast<int64_t>(tensor.element_size());
}

}  // namespace qk::cpu
