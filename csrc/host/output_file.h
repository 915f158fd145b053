// A file of known size, written at any offset in any order.
#pragma once

#include <cstddef>
#include <filesystem>

#include "os_error.h"

namespace quantkit::host {

// The file must not exist, or, with `reopen`, be a regular file of just that size, whose bytes
// stay. Its whole size is reserved at once, so a full disk shows before any work is done, and a new
// file is removed again if that fails. Different ranges may be written by different threads at the
// same time. Offsets are bytes.
class OutputFile {
 public:
  OutputFile(std::filesystem::path path, std::size_t size, bool reopen = false);

  const std::filesystem::path& path() const { return path_; }
  std::size_t size() const { return size_; }

  void write(const void* data, std::size_t nbytes, std::size_t offset) const;
  // Copies within the kernel where it can, so that the bytes never enter this process. The source
  // is an open descriptor, named by `source_path` in errors.
  void copy_from(int source, const std::filesystem::path& source_path, std::size_t source_offset,
                 std::size_t offset, std::size_t nbytes) const;
  // Lets the disk start on the range's dirty pages; durable only after sync().
  void start_writeback(std::size_t begin, std::size_t end) const;
  void sync() const;
  void close();

 private:
  void reserve() const;
  void check_reopened() const;
  void check_range(std::size_t offset, std::size_t nbytes) const;

  std::filesystem::path path_;
  std::size_t size_;
  FileDescriptor file_;
};

}  // namespace quantkit::host
