// What sm_90 does on its own while threads go on: copies that end at a barrier in shared memory
// which counts their bytes, and products of matrices that are over when they are waited for.
//
// Copies land only when no thread can go on (even seeds), or at once (odd seeds); products read
// shared memory and write their sums when they are waited for, or at once. So a wait that is
// missing, and a stage that is given back or filled too early, show as wrong results. A barrier
// that never goes on is a deadlock, and reported.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation.h"

namespace emulation {

// --- barriers; `state` is the barrier's word in shared memory ---

void make_barrier(uint64_t* state, int arrivals);
void arrive(uint64_t* state, int expected_bytes);
void wait_for(uint64_t* state, uint32_t parity);

struct Piece {
  void* target;
  const void* source;
  int bytes, read;  // the others become zeros
};
void copy_bulk(uint64_t* barrier, std::vector<Piece> pieces);

// --- products of a warp's lanes together ---

void fence_products();
void commit_products();
void wait_products();
void add_product(std::function<void()> compute);

// compute(operands of the 32 lanes) reads shared memory and writes sums.
template <typename Operand, typename Compute>
void begin_product(const Operand& operand, Compute compute) {
  warp_collective<Operand, int>("begin_product", operand, [compute](const Operand* in, int* out) {
    const auto kept = std::make_shared<std::vector<Operand>>(in, in + kWarpSize);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      out[lane] = 0;
      if (in[lane].descriptor != in[0].descriptor || in[lane].add != in[0].add)
        fail("lanes of a warp begin different products");
    }
    add_product([kept, compute] { compute(static_cast<const Operand*>(kept->data())); });
  });
}

uint32_t shared_offset(const void* address);
void* shared_at(uint32_t offset, size_t bytes);

// --- for the scheduler ---

void begin_async(unsigned warps);
bool land_one();               // false: nothing is under way
std::string left_under_way();  // at a block's end
bool made_barriers();          // and so is a kernel of sm_90

}  // namespace emulation
