// What sm_90 adds for data on its way: barriers in shared memory that count arrivals and bytes, and
// copies of tiles of a tensor by one thread (TMA). By name, each with its twin for the host
// emulation.
#pragma once

#include "cuda/common/intrinsics.h"
#include "cuda/sm90/tensor_map.h"

namespace qk::cuda::sm90 {

// Goes from one phase to the next when as many threads as it was made for have arrived and all
// bytes that were announced have landed. In shared memory.
struct alignas(8) Barrier {
  uint64_t state;
};

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

__device__ __forceinline__ void make_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// By the thread that made barriers, before the block's barrier that shows them to the others: for
// the copies, which see memory in an order of their own.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives and announces bytes that copies bring.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of this parity is over: 0 for the first, 1 for the second, 0 for the third. The
// phase before the first counts as over.
__device__ __forceinline__ void wait_for(Barrier& barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}\n"
        : "=r"(over)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (over == 0);
}

// The tile of `map` at these coordinates to shared memory, 1024 bytes aligned; what lies outside
// the tensor are zeros, and counts as bytes that land.
__device__ __forceinline__ void copy_tile(void* target, const TensorMap& map, Barrier& barrier,
                                          int at0, int at1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(shared_address(target)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at0), "r"(at1)
      : "memory");
}
__device__ __forceinline__ void copy_tile(void* target, const TensorMap& map, Barrier& barrier,
                                          int at0, int at1, int at2, int at3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6}], [%2];" ::"r"(shared_address(target)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at0), "r"(at1), "r"(at2), "r"(at3)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// How many registers a thread may have from here on, for all threads of a warp group alike.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#else

inline void make_barrier(Barrier& barrier, int arrivals) {
  emulation::make_barrier(&barrier.state, arrivals);
}
inline void publish_barriers() {}
inline void arrive(Barrier& barrier) { emulation::arrive(&barrier.state, 0); }
inline void arrive_expecting(Barrier& barrier, int bytes) {
  emulation::arrive(&barrier.state, bytes);
}
inline void wait_for(Barrier& barrier, uint32_t parity) {
  emulation::wait_for(&barrier.state, parity);
}

inline void copy_tile(void* target, const TensorMap& map, Barrier& barrier, int at0, int at1,
                      int at2 = 0, int at3 = 0) {
  emulation::check_aligned(target, 1024);
  const int at[4] = {at0, at1, at2, at3};
  const TensorShape& shape = map.shape;
  int64_t rows = 1;
  for (int d = 1; d < shape.rank; ++d) rows *= shape.box[d];
  std::vector<emulation::Piece> pieces;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t rest = row;
    const auto* from = static_cast<const char*>(shape.data);
    bool inside = true;
    for (int d = 1; d < shape.rank; ++d) {
      const int64_t index = at[d] + rest % shape.box[d];
      rest /= shape.box[d];
      inside = inside && index >= 0 && index < shape.extent[d];
      from += index * shape.stride[d];
    }
    for (int byte = 0; byte < kTileRowBytes; byte += 16) {
      const int64_t left = shape.extent[0] - at0 - byte;
      const int64_t read = !inside || at0 < 0 ? 0 : left < 0 ? 0 : left < 16 ? left : 16;
      char* const to =
          static_cast<char*>(target) + swizzled(static_cast<uint32_t>(row * kTileRowBytes + byte));
      pieces.push_back({to, read > 0 ? from + at0 + byte : nullptr, 16, static_cast<int>(read)});
    }
  }
  emulation::copy_bulk(&barrier.state, std::move(pieces));
}

inline void prefetch_map(const TensorMap&) {}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

#endif

// Where in a ring of stages somebody is, and the parity of the barriers there.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

}  // namespace qk::cuda::sm90
