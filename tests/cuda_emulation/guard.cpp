#include "guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <set>

#include "emulation.h"

namespace emulation {
namespace {

constexpr unsigned char kUntouched = 0xFF;  // NaN in every format
constexpr size_t kAlignment = 16;

std::set<const Buffer*> buffers;
std::function<void(const std::string&)> fault_report;
struct sigaction earlier_segv, earlier_bus;

std::string describe(const Buffer& buffer) {
  return "a buffer of " + std::to_string(buffer.bytes) + " bytes";
}

void on_fault(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  const auto page = sysconf(_SC_PAGESIZE);
  for (const Buffer* buffer : buffers) {
    if (address < buffer->room - page || address >= buffer->room + buffer->room_bytes + page)
      continue;
    fault_report("access " + std::to_string(address - buffer->data) +
                 " bytes from the beginning of " + describe(*buffer));
  }
  fault_report("access to memory that no buffer holds");
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  room_bytes = (bytes + page) / page * page;
  void* mapping =
      mmap(nullptr, room_bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  room = static_cast<unsigned char*>(mapping) + page;
  if (mprotect(room, room_bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  data = seed() % 2 == 0 ? room + (room_bytes - bytes) / kAlignment * kAlignment : room;
  std::memset(room, kUntouched, room_bytes);
  buffers.insert(this);
}

Buffer::~Buffer() {
  buffers.erase(this);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(room - page, room_bytes + 2 * page);
}

std::string damaged_buffers() {
  for (const Buffer* buffer : buffers) {
    for (const unsigned char* p = buffer->room; p < buffer->room + buffer->room_bytes; ++p) {
      if (p == buffer->data) p += buffer->bytes;
      if (p < buffer->room + buffer->room_bytes && *p != kUntouched) {
        return "a write " + std::to_string(p - buffer->data) + " bytes from the beginning of " +
               describe(*buffer);
      }
    }
  }
  return {};
}

FaultHandler::FaultHandler(std::function<void(const std::string&)> report) {
  fault_report = std::move(report);
  static unsigned char stack[64 << 10];
  const stack_t alternate{stack, 0, sizeof(stack)};
  sigaltstack(&alternate, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags =
      SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // left by a jump, so it must not stay blocked
  sigaction(SIGSEGV, &action, &earlier_segv);
  sigaction(SIGBUS, &action, &earlier_bus);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &earlier_segv, nullptr);
  sigaction(SIGBUS, &earlier_bus, nullptr);
}

}  // namespace emulation
