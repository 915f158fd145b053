#include "bus_error.h"

#include <csignal>

#include <unistd.h>

namespace quantkit::host {

namespace {

// Nothing but what is there already may be touched in the handler: no allocation, no lock.
const std::string* explained = nullptr;
int exit_status = 0;

extern "C" void on_bus_error(int) {
  const char* text = explained->data();
  std::size_t left = explained->size();
  while (left > 0) {
    const ssize_t done = ::write(STDERR_FILENO, text, left);
    if (done <= 0) break;
    text += done;
    left -= static_cast<std::size_t>(done);
  }
  ::_exit(exit_status);
}

}  // namespace

void explain_bus_errors(const std::string& message, int status) {
  if (explained != nullptr) return;
  explained = new std::string(message);  // never freed: the handler may run at any time
  exit_status = status;
  struct sigaction action = {};
  action.sa_handler = on_bus_error;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, nullptr);
}

}  // namespace quantkit::host
