// What async.cpp needs of the scheduler.
#pragma once

#include <cstddef>

namespace emulation {

unsigned current_warp();
size_t draw(size_t count);  // a number below it

// The thread waits until somebody wakes those that wait for the same.
void suspend_for(const void* what);
void wake_waiting(const void* what);

unsigned char* shared_begin();
size_t shared_size();

}  // namespace emulation
