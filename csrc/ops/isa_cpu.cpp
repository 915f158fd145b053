// Which instruction set the CPU ops run on. No tensor argument picks a device, so the kernels are
// for every one.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/dispatch.h"

namespace {

int64_t cpu_isa() { return static_cast<int64_t>(qk::current_isa()); }

bool cpu_isa_supported(int64_t isa) {
  STD_TORCH_CHECK(
      isa >= 0 && isa <= 2,
      "quantkit::cpu_isa_supported: isa must be 0 (portable), 1 (avx2) or 2 (avx512), got ", isa);
  return qk::isa_supported(static_cast<qk::Isa>(isa));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quantkit, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_supported", TORCH_BOX(&cpu_isa_supported));
}
