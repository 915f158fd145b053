#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace qk {
namespace {

constexpr Isa kAll[] = {Isa::avx512, Isa::avx2, Isa::portable};  // best first

std::string supported_names() {
  std::string names;
  for (Isa isa : kAll) {
    if (isa_supported(isa)) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return names;
}

Isa choose() {
  const char* forced = std::getenv("QUANTKIT_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (Isa isa : kAll) {
      if (isa_supported(isa)) return isa;
    }
  }
  for (Isa isa : kAll) {
    if (std::string_view(forced) != isa_name(isa)) continue;
    if (isa_supported(isa)) return isa;
    throw std::runtime_error(std::string("QUANTKIT_ISA=") + forced +
                             ": this machine or this build of quantkit lacks it; choose one of " +
                             supported_names());
  }
  throw std::runtime_error(std::string("QUANTKIT_ISA=") + forced +
                           ": no such instruction set; choose one of " + supported_names());
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      return "portable";
  }
  return "?";
}

bool isa_supported(Isa isa) {
#if QUANTKIT_X86
  // These builtins ask the operating system too: wide registers that it does not save count as
  // absent.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    case Isa::avx2:
      return avx2;
    case Isa::portable:
      return true;
  }
#endif
  return isa == Isa::portable;
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace qk
