// One way to launch a kernel and to get shared memory, on a device and in the host emulation
// (tests/cuda_emulation). A kernel's shared memory is one struct, asked for with `shared<S>()` and
// launched with sizeof(S) bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// Grids are cut here and loop for the rest; the emulation sets it low so that these loops are
// tested.
#ifndef QUANTKIT_MAX_GRID
#define QUANTKIT_MAX_GRID 65535
#endif

namespace qk::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr size_t kPlainSharedBytes = 48 << 10;  // more has to be asked for; every device has 99 KB

#ifdef __CUDACC__

template <typename Shared>
__device__ inline Shared& shared() {
  extern __shared__ __align__(1024) unsigned char storage[];
  return *reinterpret_cast<Shared*>(storage);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > kPlainSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(Parameters(arguments)...);
  return cudaGetLastError();
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

#else

template <typename Shared>
Shared& shared() {
  return *static_cast<Shared*>(emulation::shared_memory(sizeof(Shared)));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, const Arguments&... arguments) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}

inline int multiprocessors() { return QUANTKIT_MAX_GRID; }

#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_extent(int64_t wanted) {
  return static_cast<unsigned>(wanted < QUANTKIT_MAX_GRID ? wanted : QUANTKIT_MAX_GRID);
}

inline int power_of_two_at_least(int64_t n, int limit) {
  int power = 1;
  while (power < n && power < limit) power *= 2;
  return power;
}

}  // namespace qk::cuda
