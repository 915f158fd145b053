#include "os_error.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace quantkit::host {

OsError::OsError(int code, std::string action, std::filesystem::path path)
    : code_(code),
      message_(std::generic_category().message(code) + " while " + std::move(action)),
      path_(std::move(path)) {}

FileDescriptor::~FileDescriptor() { close(); }

int FileDescriptor::close() {
  if (fd_ < 0) return 0;
  // Linux frees the descriptor even when close() is interrupted, so it is never called twice.
  const int result = ::close(std::exchange(fd_, -1));
  return result == 0 || errno == EINTR ? 0 : errno;
}

FileDescriptor open_file(const std::filesystem::path& path, int flags, const char* action) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) throw OsError(errno, action, path);
  return FileDescriptor(fd);
}

void fsync_directory(const std::filesystem::path& path) {
  const FileDescriptor directory = open_file(path, O_RDONLY | O_DIRECTORY, "opening the folder");
  // EINVAL: the file system has no such operation (some network ones); its renames are ordered
  // anyway.
  if (::fsync(directory.get()) != 0 && errno != EINVAL) {
    throw OsError(errno, "flushing the folder to disk", path);
  }
}

}  // namespace quantkit::host
