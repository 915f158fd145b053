#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "async.h"
#include "guard.h"
#include "scheduler.h"

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;

enum class State { kReady, kAtBarrier, kAtCollective, kAtShared, kDone };

struct Copy {
  void* target;
  const void* source;
  int bytes, read;

  void land() const {
    std::memcpy(target, source, static_cast<size_t>(read));
    std::memset(static_cast<char*>(target) + read, 0, static_cast<size_t>(bytes - read));
  }
};

// A context starts a fiber; afterwards _setjmp and _longjmp change between it and the scheduler
// without system calls.
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state = State::kReady;
  const void* waits_for = nullptr;        // kAtShared
  std::vector<std::vector<Copy>> groups;  // closed, not waited for
  std::vector<Copy> open;
};

struct Device {
  std::vector<std::unique_ptr<unsigned char[]>> stacks;  // kept from block to block
  std::vector<Fiber> fibers;
  std::vector<std::vector<unsigned>> ready;  // threads of each warp
  unsigned favourite = 0;                    // warp
  std::vector<Collective> warps;
  const std::function<void()>* thread = nullptr;
  unsigned current = 0, live = 0, at_barrier = 0;
  std::unique_ptr<Buffer> shared;
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  std::string error;
  std::mt19937_64 random;
};

Device device;
uint64_t current_seed = 0;
unsigned largest = 0;

[[noreturn]] void to_scheduler() { _longjmp(device.scheduler, 1); }

void suspend(State state) {
  Fiber& fiber = device.fibers[device.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) to_scheduler();
}

void wake(unsigned first, unsigned end, State state) {
  for (unsigned i = first; i < end; ++i) {
    if (device.fibers[i].state != state) continue;
    device.fibers[i].state = State::kReady;
    device.ready[i / kWarpSize].push_back(i);
  }
}

void open_barrier_if_complete() {
  if (device.live == 0 || device.at_barrier < device.live) return;
  device.at_barrier = 0;
  wake(0, static_cast<unsigned>(device.fibers.size()), State::kAtBarrier);
}

void fiber_main() {
  (*device.thread)();
  device.fibers[device.current].state = State::kDone;
  --device.live;
  open_barrier_if_complete();
  to_scheduler();
}

void start_fibers(unsigned threads) {
  device.fibers = std::vector<Fiber>(threads);
  device.warps = std::vector<Collective>((threads + kWarpSize - 1) / kWarpSize);
  device.live = threads;
  device.at_barrier = 0;
  device.ready.assign(device.warps.size(), {});
  for (unsigned i = 0; i < threads; ++i) device.ready[i / kWarpSize].push_back(i);
  while (device.stacks.size() < threads)
    device.stacks.push_back(std::make_unique<unsigned char[]>(kStackBytes));
  for (unsigned i = 0; i < threads; ++i) {
    ucontext_t& context = device.fibers[i].start;
    getcontext(&context);
    context.uc_stack.ss_sp = device.stacks[i].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
  }
}

void resume(unsigned index) {
  device.current = index;
  const unsigned x = block_extent.x, y = block_extent.y;
  thread_index = dim3(index % x, index / x % y, index / (x * y));
  Fiber& fiber = device.fibers[index];
  if (_setjmp(device.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

std::string describe_deadlock() {
  std::string text = "deadlock: no thread can go on;";
  for (size_t i = 0; i < device.fibers.size(); ++i) {
    const State state = device.fibers[i].state;
    if (state == State::kDone) continue;
    const char* where = state == State::kAtBarrier  ? "barrier"
                        : state == State::kAtShared ? "a barrier in shared memory"
                                                    : device.warps[i / kWarpSize].name;
    text += " thread " + std::to_string(i) + " at " + where + ",";
    if (text.size() > 400) return text + " ...";
  }
  return text;
}

// A warp is followed until all of its lanes wait, mostly, then another is drawn: so warps get as
// far ahead of each other as the barriers let them. Which lane goes next is drawn each time.
bool choose_thread(unsigned* thread) {
  if (device.ready[device.favourite].empty() || device.random() % 256 == 0) {
    std::vector<unsigned> able;
    for (unsigned warp = 0; warp < device.ready.size(); ++warp) {
      if (!device.ready[warp].empty()) able.push_back(warp);
    }
    if (able.empty()) return false;
    device.favourite = able[device.random() % able.size()];
  }
  std::vector<unsigned>& lanes = device.ready[device.favourite];
  std::swap(lanes[device.random() % lanes.size()], lanes.back());
  *thread = lanes.back();
  lanes.pop_back();
  return true;
}

// A fault on the way is an error like those of threads.
bool land_here() { return _setjmp(device.scheduler) != 0 || land_one(); }

void run_block() {
  std::memset(device.shared->data, 0xFF, device.shared_bytes);
  start_fibers(block_extent.x * block_extent.y * block_extent.z);
  begin_async(static_cast<unsigned>(device.warps.size()));
  device.favourite = 0;
  while (device.live > 0 && device.error.empty()) {
    unsigned thread = 0;
    if (choose_thread(&thread)) {
      resume(thread);
    } else if (!land_here()) {
      device.error = describe_deadlock();
    }
  }
  if (device.error.empty()) device.error = left_under_way();
  if (device.error.empty() && device.shared_bytes > 99 << 10 && !made_barriers())
    device.error = "sm_86 has no more than 99 KB of shared memory for a block";
}

std::string place() {
  return " (block " + std::to_string(block_index.x) + "," + std::to_string(block_index.y) +
         ", thread " + std::to_string(device.current) + ", seed " + std::to_string(current_seed) +
         ")";
}

}  // namespace

void set_seed(uint64_t seed) {
  current_seed = seed;
  largest = 0;
}
unsigned largest_block() { return largest; }
uint64_t seed() { return current_seed; }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const auto empty = [](const dim3& extent) { return extent.x * extent.y * extent.z == 0; };
  if (empty(grid) || empty(block) || block.x * block.y * block.z > 1024 || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > 227 << 10) {
    throw std::runtime_error("emulation: no device takes a launch of these extents");
  }
  largest = std::max(largest, block.x * block.y * block.z);
  grid_extent = grid;
  block_extent = block;
  device.thread = &thread;
  device.error.clear();
  device.random.seed(current_seed);
  device.shared = std::make_unique<Buffer>(shared_bytes);
  device.shared_bytes = shared_bytes;
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), device.random);
  {
    const FaultHandler handler([](const std::string& what) { fail(what); });
    for (const unsigned index : order) {
      block_index = dim3(index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y));
      run_block();
      if (!device.error.empty()) break;
    }
  }
  device.shared.reset();
  if (device.error.empty()) device.error = damaged_buffers();
  if (!device.error.empty()) throw std::runtime_error("emulation: " + device.error);
}

void* shared_memory(size_t bytes) {
  if (bytes != device.shared_bytes) {
    fail("the kernel uses " + std::to_string(bytes) +
         " bytes of shared memory and was launched with " + std::to_string(device.shared_bytes));
  }
  return device.shared->data;
}

void sync_block() {
  ++device.at_barrier;
  if (device.at_barrier < device.live) {
    suspend(State::kAtBarrier);
  } else {
    open_barrier_if_complete();
  }
}

void fail(const std::string& what) {
  device.error = what + place();
  to_scheduler();
}

void check_aligned(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail("a vector of " + std::to_string(alignment) + " bytes is not aligned");
  }
}

void copy_async(void* target, const void* source, int bytes, int read) {
  const auto* to = static_cast<unsigned char*>(target);
  if (to < device.shared->data || to + bytes > device.shared->data + device.shared_bytes)
    fail("an asynchronous copy to what is not the block's shared memory");
  if (read < 0 || read > bytes)
    fail("an asynchronous copy of " + std::to_string(read) + " bytes of " + std::to_string(bytes));
  const Copy copy{target, source, bytes, read};
  if (current_seed % 2 == 0) {
    device.fibers[device.current].open.push_back(copy);
  } else {
    copy.land();
  }
}

void copy_commit() {
  Fiber& fiber = device.fibers[device.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void copy_wait(int pending) {
  std::vector<std::vector<Copy>>& groups = device.fibers[device.current].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) copy.land();
    groups.erase(groups.begin());
  }
}

Collective& enter_collective(const char* name, int* lane) {
  Collective& collective = device.warps[device.current / kWarpSize];
  if (collective.arrived > 0 && std::strcmp(collective.name, name) != 0) {
    fail(std::string("lanes of a warp are at different collectives: ") + collective.name + " and " +
         name);
  }
  collective.name = name;
  ++collective.arrived;
  *lane = static_cast<int>(device.current % kWarpSize);
  return collective;
}

void finish_collective(Collective& collective) {
  collective.arrived = 0;
  const unsigned first = device.current / kWarpSize * kWarpSize;
  wake(first, first + kWarpSize, State::kAtCollective);
}

void wait_for_collective(Collective&) { suspend(State::kAtCollective); }

unsigned current_warp() { return device.current / kWarpSize; }
size_t draw(size_t count) { return device.random() % count; }

void suspend_for(const void* what) {
  device.fibers[device.current].waits_for = what;
  suspend(State::kAtShared);
}

void wake_waiting(const void* what) {
  for (unsigned i = 0; i < device.fibers.size(); ++i) {
    Fiber& fiber = device.fibers[i];
    if (fiber.state != State::kAtShared || fiber.waits_for != what) continue;
    fiber.state = State::kReady;
    device.ready[i / kWarpSize].push_back(i);
  }
}

unsigned char* shared_begin() { return device.shared->data; }
size_t shared_size() { return device.shared_bytes; }

}  // namespace emulation
