// Failures of the operating system, with the call's purpose and the file they concern.
#pragma once

#include <exception>
#include <filesystem>
#include <string>
#include <utility>

namespace quantkit::host {

// Reaches Python as OSError(code, "<strerror> while <action>", path), so that `except
// FileExistsError` and the like work there.
class OsError : public std::exception {
 public:
  OsError(int code, std::string action, std::filesystem::path path);

  const char* what() const noexcept override { return message_.c_str(); }
  int code() const { return code_; }
  const std::string& message() const { return message_; }
  const std::filesystem::path& path() const { return path_; }

 private:
  int code_;
  std::string message_;
  std::filesystem::path path_;
};

// A file descriptor that closes itself.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor();

  int get() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  // Closes now; returns 0 or the errno of close(2), which on some network file systems is where a
  // failed write shows.
  int close();

 private:
  int fd_;
};

// open(2), retried on EINTR; `action` says why, for the error.
FileDescriptor open_file(const std::filesystem::path& path, int flags, const char* action);

// Makes the directory's entries durable: a rename or a new file survives a crash only after this.
void fsync_directory(const std::filesystem::path& path);

}  // namespace quantkit::host
