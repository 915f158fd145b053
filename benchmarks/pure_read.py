"""Nothing but reading memory: what a kernel that reads it once can reach at best. C++, compiled when first needed."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

# Each thread reads one stretch. The functions of OpenMP are found in the runtime that torch has loaded, so that these
# are the threads that torch's kernels run on, awake when those have just finished.
SOURCE = """
#include <omp.h>
#include <cstddef>

typedef long long Vector __attribute__((vector_size(64), aligned(1)));

static long long read(const char* p, const char* end) {
  Vector sum[4] = {};
  for (; p + 256 <= end; p += 256) {
    for (int v = 0; v < 4; ++v) __builtin_prefetch(p + 4096 + 64 * v);
    for (int v = 0; v < 4; ++v) sum[v] |= *(const Vector*)(p + 64 * v);
  }
  const Vector all = sum[0] | sum[1] | sum[2] | sum[3];
  return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

extern "C" long long read_all(const char* const* data, const size_t* sizes, int count, int threads) {
  long long sum = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : sum)
  for (int t = 0; t < threads; ++t) {
    for (int i = 0; i < count; ++i) {
      sum ^= read(data[i] + sizes[i] * t / threads, data[i] + sizes[i] * (t + 1) / threads);
    }
  }
  return sum;
}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="pure_read_"))
    source, made, library = folder / "read.cpp", folder / "read.o", folder / "read.so"
    source.write_text(SOURCE)
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-O3", "-march=native", "-fopenmp", "-fPIC", "-c", str(source), "-o", str(made)], check=True
    )
    subprocess.run([compiler, "-shared", str(made), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for file in (source, made, library):
        file.unlink()
    folder.rmdir()
    loaded.read_all.restype = ctypes.c_longlong
    return loaded


class PureRead:
    """Calling it reads all bytes of `tensors` once, `threads` threads a share of each tensor."""

    def __init__(self, tensors: tuple[Tensor, ...], threads: int) -> None:
        self.tensors, self.threads = tensors, threads
        count = len(tensors)
        self.data = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
        self.sizes = (ctypes.c_size_t * count)(*(t.nbytes for t in tensors))
        self.read = _library().read_all

    def __call__(self) -> None:
        self.read(self.data, self.sizes, len(self.tensors), self.threads)
