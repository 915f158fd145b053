// A CUDA device on one CPU thread. Every thread of a block is a fiber that runs until it has to
// wait for others: at a barrier, or at a collective of its warp. Which of the fibers able to run
// goes next is drawn from a seed, warps running far ahead of each other, so a missing barrier shows
// as a wrong result; if none is able to run, that is a deadlock and reported.
//
// Asynchronous copies land at their wait or at once, by the seed: with one of each, a wait that is
// missing and a buffer that is filled too early both show as a wrong result.
//
// What else is found: reads and writes outside a buffer (guard.h), misaligned vectors, use of
// shared memory that nothing was written to (it starts as 0xFF, NaN, in each block), lanes of a
// warp at different collectives. What is not: speed, registers, and races between warps that no
// order of whole fibers shows.
#pragma once

#include <cstring>
#include <functional>
#include <string>

#include "cuda_runtime.h"

namespace emulation {

inline dim3 thread_index, block_index, block_extent, grid_extent;

// Runs `thread` as a kernel of these extents. Throws std::runtime_error on the first fault.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Order of fibers and blocks of all later runs, and whether later buffers touch a forbidden page
// with their end (even) or their beginning (odd seeds).
void set_seed(uint64_t seed);
uint64_t seed();

// Threads of the largest block since the seed was set: tells which kernel was taken.
unsigned largest_block();

// --- for the threads of a kernel ---

// The block's shared memory; `bytes` must be what the kernel was launched with.
void* shared_memory(size_t bytes);

void sync_block();

// Ends the run with an error, from inside a thread.
[[noreturn]] void fail(const std::string& what);

void check_aligned(const void* address, size_t alignment);

// A copy to the block's shared memory, zeros beyond `read` bytes. It lands when its thread waits
// for its group (even seeds), as late as a device may, or at once (odd seeds), as early.
void copy_async(void* target, const void* source, int bytes, int read);
void copy_commit();
void copy_wait(int pending);  // until that many groups are under way

constexpr int kWarpSize = 32;
constexpr size_t kOperandBytes = 64;

// Operands of the warp's lanes, once all of them are here.
struct Collective {
  const char* name = nullptr;
  int arrived = 0;
  alignas(16) unsigned char in[kWarpSize][kOperandBytes];
  alignas(16) unsigned char out[kWarpSize][kOperandBytes];
};

Collective& enter_collective(const char* name, int* lane);
void finish_collective(Collective& collective);  // by the last lane: wakes the others
void wait_for_collective(Collective& collective);

// Every lane brings an In; the last one there computes all Outs from all Ins; every lane leaves
// with its own.
template <typename In, typename Out, typename Compute>
Out warp_collective(const char* name, const In& operand, Compute compute) {
  static_assert(sizeof(In) <= kOperandBytes && sizeof(Out) <= kOperandBytes);
  int lane = 0;
  Collective& collective = enter_collective(name, &lane);
  std::memcpy(collective.in[lane], &operand, sizeof(In));
  if (collective.arrived == kWarpSize) {
    In in[kWarpSize];
    Out out[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) std::memcpy(&in[i], collective.in[i], sizeof(In));
    compute(static_cast<const In*>(in), static_cast<Out*>(out));
    for (int i = 0; i < kWarpSize; ++i) std::memcpy(collective.out[i], &out[i], sizeof(Out));
    finish_collective(collective);
  } else {
    wait_for_collective(collective);
  }
  Out result;
  std::memcpy(&result, collective.out[lane], sizeof(Out));
  return result;
}

}  // namespace emulation

#include "async.h"
