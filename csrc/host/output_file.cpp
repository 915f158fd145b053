#include "output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace quantkit::host {
namespace {

// Linux transfers at most 0x7ffff000 bytes a call; stay below, and on a page boundary.
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;
constexpr std::size_t kCopyBuffer = std::size_t{1} << 20;

// The errors of copy_file_range that mean "not between these two files": other file systems, old
// kernels, file systems and sandboxes that lack it.
bool kernel_copy_unavailable(int error) {
  return error == EXDEV || error == ENOSYS || error == EOPNOTSUPP || error == EINVAL ||
         error == EPERM || error == ETXTBSY;
}

}  // namespace

OutputFile::OutputFile(std::filesystem::path path, std::size_t size, bool reopen)
    : path_(std::move(path)),
      size_(size),
      // O_NONBLOCK: a FIFO would block the open; check_reopened() then refuses it.
      file_(reopen ? open_file(path_, O_WRONLY | O_NOFOLLOW | O_NONBLOCK, "opening the file again")
                   : open_file(path_, O_WRONLY | O_CREAT | O_EXCL, "creating the file")) {
  if (reopen) {
    check_reopened();
    reserve();
    return;
  }
  try {
    reserve();
  } catch (...) {
    ::unlink(path_.c_str());
    throw;
  }
}

void OutputFile::check_reopened() const {
  struct stat status;
  if (::fstat(file_.get(), &status) != 0) throw OsError(errno, "asking for its size", path_);
  // A second name would mean that the bytes are somebody else's, too.
  if (!S_ISREG(status.st_mode) || status.st_nlink != 1 ||
      static_cast<std::size_t>(status.st_size) != size_) {
    throw OsError(EINVAL, "opening again: not a file of " + std::to_string(size_) + " bytes",
                  path_);
  }
}

void OutputFile::reserve() const {
  if (size_ == 0) return;
  int result;
  // Not posix_fallocate: where the file system cannot reserve, that writes every block.
  do {
    result = ::fallocate(file_.get(), 0, 0, static_cast<off_t>(size_));
  } while (result != 0 && errno == EINTR);
  if (result == 0) return;
  const bool unsupported = errno == EOPNOTSUPP || errno == ENOSYS;
  if (unsupported && ::ftruncate(file_.get(), static_cast<off_t>(size_)) == 0) return;
  throw OsError(errno, "reserving " + std::to_string(size_) + " bytes", path_);
}

void OutputFile::check_range(std::size_t offset, std::size_t nbytes) const {
  if (!file_.is_open()) throw std::logic_error(path_.string() + " is closed");
  if (nbytes > size_ || offset > size_ - nbytes) {
    throw std::out_of_range(std::to_string(nbytes) + " bytes at " + std::to_string(offset) +
                            " are not within the " + std::to_string(size_) + " bytes of " +
                            path_.string());
  }
}

void OutputFile::write(const void* data, std::size_t nbytes, std::size_t offset) const {
  check_range(offset, nbytes);
  const auto* source = static_cast<const std::byte*>(data);
  while (nbytes > 0) {
    const ssize_t done =
        ::pwrite(file_.get(), source, std::min(nbytes, kMaxTransfer), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      throw OsError(done < 0 ? errno : EIO, "writing at byte " + std::to_string(offset), path_);
    }
    source += done;
    offset += static_cast<std::size_t>(done);
    nbytes -= static_cast<std::size_t>(done);
  }
}

void OutputFile::copy_from(int source, const std::filesystem::path& source_path,
                           std::size_t source_offset, std::size_t offset,
                           std::size_t nbytes) const {
  check_range(offset, nbytes);
  while (nbytes > 0) {
    auto from = static_cast<loff_t>(source_offset);
    auto to = static_cast<loff_t>(offset);
    const ssize_t done =
        ::copy_file_range(source, &from, file_.get(), &to, std::min(nbytes, kMaxTransfer), 0);
    if (done < 0 && errno == EINTR) continue;
    // 0 bytes should mean the end of the source, but some file systems answer so for whole files
    // that they cannot copy; the loop below finds out.
    if (done == 0 || (done < 0 && kernel_copy_unavailable(errno))) break;
    if (done < 0) {
      throw OsError(errno, "copying from " + source_path.string(), path_);
    }
    source_offset += static_cast<std::size_t>(done);
    offset += static_cast<std::size_t>(done);
    nbytes -= static_cast<std::size_t>(done);
  }
  if (nbytes == 0) return;
  std::vector<std::byte> buffer(std::min(nbytes, kCopyBuffer));
  while (nbytes > 0) {
    const ssize_t got = ::pread(source, buffer.data(), std::min(nbytes, buffer.size()),
                                static_cast<off_t>(source_offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      throw OsError(errno, "reading at byte " + std::to_string(source_offset), source_path);
    if (got == 0) {
      throw OsError(EIO, "reading: the file ends at byte " + std::to_string(source_offset),
                    source_path);
    }
    const auto count = static_cast<std::size_t>(got);
    write(buffer.data(), count, offset);
    source_offset += count;
    offset += count;
    nbytes -= count;
  }
}

void OutputFile::start_writeback(std::size_t begin, std::size_t end) const {
  check_range(begin, end - begin);
  if (begin == end) return;  // a length of 0 would mean "to the end of the file"
  const int result = ::sync_file_range(file_.get(), static_cast<off_t>(begin),
                                       static_cast<off_t>(end - begin), SYNC_FILE_RANGE_WRITE);
  // A hint: what it cannot start, sync() does and reports. Only a failed write-back counts here.
  if (result != 0 && (errno == EIO || errno == ENOSPC)) {
    throw OsError(errno, "writing back", path_);
  }
}

void OutputFile::sync() const {
  check_range(0, 0);
  int result;
  do {
    result = ::fsync(file_.get());
  } while (result != 0 && errno == EINTR);
  if (result != 0) throw OsError(errno, "flushing to disk", path_);
}

void OutputFile::close() {
  const int error = file_.close();
  if (error != 0) throw OsError(error, "closing", path_);
}

}  // namespace quantkit::host
