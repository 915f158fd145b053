#include "async.h"

#include <algorithm>
#include <map>

#include "scheduler.h"

namespace emulation {
namespace {

constexpr uint64_t kMarker = 0x4241525249455221;  // in a barrier's word

struct Barrier {
  int arrivals, missing;
  int64_t bytes;  // announced and not landed
  uint64_t phase;
};

struct Copy {
  uint64_t* barrier;
  std::vector<Piece> pieces;
};

struct WarpProducts {
  bool fenced = false;
  int begun = 0;
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
};

std::map<const uint64_t*, Barrier> barriers;
std::vector<Copy> copies;
std::vector<WarpProducts> products;

Barrier& barrier_at(const uint64_t* state) {
  const auto found = barriers.find(state);
  if (found == barriers.end()) fail("a barrier in shared memory is used before it was made");
  if (*state != kMarker) fail("a barrier in shared memory was overwritten");
  return found->second;
}

void go_on(const uint64_t* state, Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  wake_waiting(state);
}

void land(const Copy& copy) {
  int64_t bytes = 0;
  for (const Piece& piece : copy.pieces) {
    if (piece.read > 0) std::memcpy(piece.target, piece.source, static_cast<size_t>(piece.read));
    std::memset(static_cast<char*>(piece.target) + piece.read, 0,
                static_cast<size_t>(piece.bytes - piece.read));
    bytes += piece.bytes;
  }
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= bytes;
  go_on(copy.barrier, barrier);
}

bool early() { return seed() % 2 != 0; }

// By all lanes of the warp together.
template <typename Function>
void by_warp(const char* name, Function f) {
  warp_collective<int, int>(name, 0, [f](const int*, int* out) {
    std::fill_n(out, kWarpSize, 0);
    f(products[current_warp()]);
  });
}

}  // namespace

void make_barrier(uint64_t* state, int arrivals) {
  check_aligned(state, 8);
  shared_offset(state);
  if (arrivals <= 0) fail("a barrier for " + std::to_string(arrivals) + " threads");
  barriers[state] = {arrivals, arrivals, 0, 0};
  *state = kMarker;
}

void arrive(uint64_t* state, int expected_bytes) {
  Barrier& barrier = barrier_at(state);
  if (barrier.missing == 0) fail("more threads arrive at a barrier than it was made for");
  barrier.bytes += expected_bytes;
  --barrier.missing;
  go_on(state, barrier);
}

void wait_for(uint64_t* state, uint32_t parity) {
  while (barrier_at(state).phase % 2 == parity % 2) suspend_for(state);
}

void copy_bulk(uint64_t* barrier, std::vector<Piece> pieces) {
  barrier_at(barrier);
  for (const Piece& piece : pieces) {
    shared_at(shared_offset(piece.target), static_cast<size_t>(piece.bytes));
    check_aligned(piece.source, 16);
  }
  Copy copy{barrier, std::move(pieces)};
  if (early()) {
    land(copy);
  } else {
    copies.push_back(std::move(copy));
  }
}

void fence_products() {
  by_warp("fence_products", [](WarpProducts& warp) { warp.fenced = true; });
}

void add_product(std::function<void()> compute) {
  WarpProducts& warp = products[current_warp()];
  if (!warp.fenced) fail("a product begins without a fence after registers were written");
  ++warp.begun;
  if (early()) {
    compute();
  } else {
    warp.open.push_back(std::move(compute));
  }
}

void commit_products() {
  by_warp("commit_products", [](WarpProducts& warp) {
    warp.fenced = false;
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
  });
}

void wait_products() {
  by_warp("wait_products", [](WarpProducts& warp) {
    warp.fenced = false;
    for (const auto& group : warp.groups) {
      for (const auto& compute : group) compute();
    }
    warp.groups.clear();
  });
}

uint32_t shared_offset(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  if (at < shared_begin() || at >= shared_begin() + shared_size())
    fail("an address that is not in the block's shared memory");
  return static_cast<uint32_t>(at - shared_begin());
}

void* shared_at(uint32_t offset, size_t bytes) {
  if (offset + bytes > shared_size()) fail("an offset beyond the block's shared memory");
  return shared_begin() + offset;
}

void begin_async(unsigned warps) {
  barriers.clear();
  copies.clear();
  products.assign(warps, {});
}

bool land_one() {
  if (copies.empty()) return false;
  std::swap(copies[draw(copies.size())], copies.back());
  const Copy copy = std::move(copies.back());
  copies.pop_back();
  land(copy);
  return true;
}

bool made_barriers() { return !barriers.empty(); }

std::string left_under_way() {
  if (!copies.empty()) return "a block ends before its copies have landed";
  for (size_t warp = 0; warp < products.size(); ++warp) {
    if (!products[warp].open.empty() || !products[warp].groups.empty())
      return "a block ends before its products were waited for";
    if (products[warp].begun != products[warp / 4 * 4].begun)
      return "the four warps of a group have begun different numbers of products";
  }
  return {};
}

}  // namespace emulation
