// Which instruction set the CPU kernels run on: detected once, or forced by the environment
// variable QUANTKIT_ISA.
#pragma once

namespace qk {

// In rising order; a machine that has one has all below it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);

// Whether this build has kernels for `isa` and this machine (CPU and operating system) can run
// them.
bool isa_supported(Isa isa);

// The best supported one, or what QUANTKIT_ISA (portable, avx2, avx512) says. The variable is read
// at the first call. Throws std::runtime_error if it names no instruction set or one that is not
// supported here.
Isa current_isa();

}  // namespace qk
