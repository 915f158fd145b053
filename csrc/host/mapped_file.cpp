#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <utility>

#ifndef MADV_POPULATE_READ  // Linux 5.14; older headers lack the name
#define MADV_POPULATE_READ 22
#endif

namespace quantkit::host {
namespace {

// A fault maps more than the page that was touched: neighbours in the page cache (fault-around),
// and the whole of a large folio. It stays within one page table, which is this much address space.
constexpr std::size_t kFaultExtent = 2 * 1024 * 1024;

std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t size_of(int fd, const std::filesystem::path& path) {
  struct stat status;
  if (::fstat(fd, &status) != 0) throw OsError(errno, "asking for its size", path);
  if (!S_ISREG(status.st_mode)) throw OsError(EINVAL, "mapping: not a regular file", path);
  return static_cast<std::size_t>(status.st_size);
}

}  // namespace

MappedFile::MappedFile(std::filesystem::path path)
    // O_NONBLOCK: a FIFO would block the open; size_of() then refuses it.
    : path_(std::move(path)),
      file_(open_file(path_, O_RDONLY | O_NONBLOCK, "opening for reading")),
      size_(size_of(file_.get(), path_)) {
  if (size_ == 0) return;  // mmap refuses an empty range
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_.get(), 0);
  if (address == MAP_FAILED) throw OsError(errno, "mapping into memory", path_);
  data_ = static_cast<std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

void MappedFile::check_range(std::size_t begin, std::size_t end) const {
  if (begin > end || end > size_) {
    throw std::out_of_range("bytes " + std::to_string(begin) + " to " + std::to_string(end) +
                            " are not within the " + std::to_string(size_) + " bytes of " +
                            path_.string());
  }
}

int MappedFile::advise(std::size_t begin, std::size_t end, std::size_t alignment,
                       int advice) const {
  if (begin == end) return 0;
  // Aligned as addresses, not as offsets in the file, because page tables are.
  const auto base = reinterpret_cast<std::uintptr_t>(data_);
  const std::size_t limit = (size_ + page_size() - 1) / page_size() * page_size();
  const std::uintptr_t first = std::max((base + begin) / alignment * alignment, base);
  const std::uintptr_t last =
      std::min((base + end + alignment - 1) / alignment * alignment, base + limit);
  int result;
  do {
    result = ::madvise(reinterpret_cast<void*>(first), last - first, advice);
  } while (result != 0 && (errno == EINTR || errno == EAGAIN));
  return result == 0 ? 0 : errno;
}

void MappedFile::populate(std::size_t begin, std::size_t end) const {
  check_range(begin, end);
  if (size_of(file_.get(), path_) < end) {
    throw OsError(EIO, "reading: the file became shorter after it was opened", path_);
  }
  int error = advise(begin, end, page_size(), MADV_POPULATE_READ);
  if (error == EINVAL) error = advise(begin, end, page_size(), MADV_WILLNEED);  // before Linux 5.14
  if (error == EFAULT) {  // the access itself would have been a SIGBUS
    throw OsError(EIO, "reading: truncated meanwhile, or the device failed", path_);
  }
  if (error != 0) throw OsError(error, "reading", path_);
}

void MappedFile::prefetch(std::size_t begin, std::size_t end) const {
  check_range(begin, end);
  const int error = advise(begin, end, page_size(), MADV_WILLNEED);
  if (error != 0) throw OsError(error, "reading ahead", path_);
}

void MappedFile::drop(std::size_t begin, std::size_t end) const {
  check_range(begin, end);
  // Widened, not narrowed: what the faults at a tensor's edges mapped of its neighbours would
  // otherwise stay resident, hundreds of kilobytes for each of maybe 100,000 tensors. Dropping a
  // page in use only costs a minor fault, because the mapping is of the page cache.
  const int error = advise(begin, end, std::max(kFaultExtent, page_size()), MADV_DONTNEED);
  if (error != 0) throw OsError(error, "unmapping pages", path_);
}

}  // namespace quantkit::host
