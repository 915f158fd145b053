// Memory that a stray access cannot leave unnoticed: between two pages that may not be touched, at
// the end of the room between them (even seeds) or at its beginning (odd seeds), the rest of the
// room filled with a pattern.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace emulation {

struct Buffer {
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  unsigned char*
      data;  // aligned to 16 bytes, as far as odd lengths allow no more; filled with 0xFF
  size_t bytes;
  unsigned char* room;
  size_t room_bytes;
};

// What was written beside a buffer since it was made, or nothing.
std::string damaged_buffers();

// While it lives, a memory fault calls `report`, which must not return.
class FaultHandler {
 public:
  explicit FaultHandler(std::function<void(const std::string&)> report);
  ~FaultHandler();
};

}  // namespace emulation
