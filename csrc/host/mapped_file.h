// A whole file mapped read-only, for tensors that are views on the page cache.
#pragma once

#include <cstddef>
#include <filesystem>

#include "os_error.h"

namespace quantkit::host {

// PROT_READ and MAP_SHARED: no memory is reserved, so a file larger than RAM maps, and nothing can
// alter it (a write through the mapping is a segmentation fault).
//
// A file that another process truncates while it is mapped, or a sector that cannot be read, raises
// SIGBUS at the access. populate() checks for both and throws instead, so call it before reading;
// what remains is a truncation between populate() and the read.
//
// Mapped pages count into the process's resident set until drop(). Ranges are byte offsets [begin,
// end).
class MappedFile {
 public:
  explicit MappedFile(std::filesystem::path path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  int fd() const { return file_.get(); }

  // Reads the range and maps it; returns when all of it is resident.
  void populate(std::size_t begin, std::size_t end) const;
  // Starts reading the range into the page cache and returns at once.
  void prefetch(std::size_t begin, std::size_t end) const;
  // Unmaps the range's pages; they stay in the page cache, and a later access maps them again.
  void drop(std::size_t begin, std::size_t end) const;

 private:
  void check_range(std::size_t begin, std::size_t end) const;
  // madvise(2) on the range, widened to addresses that are multiples of `alignment`; 0 or errno.
  int advise(std::size_t begin, std::size_t end, std::size_t alignment, int advice) const;

  std::filesystem::path path_;
  FileDescriptor file_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace quantkit::host
