// Fresh memory for large outputs.
#pragma once

#include <cstddef>

namespace qk {

// Asks for huge pages under a buffer that has not been written yet. A large output is new memory
// from the system, and its first touch, 4 KiB at a time, costs more than the whole kernel does; in
// 2 MiB pages it is cheap. Advice only: nothing changes where the system does not follow it, or for
// buffers too small to matter.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace qk
