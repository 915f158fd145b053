// A clean end where a mapped file is gone.
#pragma once

#include <string>

namespace quantkit::host {

// What an access to a mapped file becomes if the file was truncated, or its disk failed, since the
// access was checked: SIGBUS. From now on `message` goes to stderr then, and the process exits with
// `status`, instead of dying without a word. It cannot be caught as an exception: the access may be
// in the middle of any kernel. The first call counts.
void explain_bus_errors(const std::string& message, int status);

}  // namespace quantkit::host
