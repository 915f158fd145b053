// What the emulated ops need from torch beyond csrc/ops: outputs and inputs in guarded memory.
#include <cstring>

#include "emulation.h"
#include "faults.h"
#include "faults_async.h"
#include "guard.h"
#include "layouts.h"
#include "ops/cuda_device.h"

namespace qk::cuda {

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  int64_t elements = 1;
  std::vector<int64_t> strides(shape.size());
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = elements;
    elements *= shape[d] > 0 ? shape[d] : 1;
  }
  for (const int64_t extent : shape) elements = extent == 0 ? 0 : elements;
  const size_t width =
      torch::stable::new_empty(like, std::vector<int64_t>{0}, dtype).element_size();
  auto* buffer = new emulation::Buffer(static_cast<size_t>(elements) * width);
  return torch::stable::from_blob(buffer->data, shape, strides, like.device(), dtype,
                                  [buffer](void*) { delete buffer; });
}

namespace {

// A contiguous copy in guarded memory.
Tensor guarded(const Tensor& x) {
  check(x.is_contiguous(), "guarded", "x must be contiguous");
  const auto sizes = x.sizes();
  const Tensor copy =
      new_tensor(x, std::vector<int64_t>(sizes.begin(), sizes.end()), x.scalar_type());
  std::memcpy(copy.mutable_data_ptr(), x.const_data_ptr(),
              static_cast<size_t>(x.numel()) * x.element_size());
  return copy;
}

Tensor fault(const Tensor& x, int64_t kind) {
  const Tensor out = new_tensor(x, {64}, ScalarType::Float);
  run_fault(static_cast<Fault>(kind), static_cast<const float*>(x.const_data_ptr()),
            static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Tensor async_fault(const Tensor& x, int64_t kind) {
  const Tensor out = new_tensor(x, {256}, ScalarType::Int);
  run_async_fault(static_cast<AsyncFault>(kind), static_cast<const int8_t*>(x.const_data_ptr()),
                  static_cast<int32_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor copied_tile(const Tensor& x, int64_t at0, int64_t at1) {
  const Tensor out = new_tensor(x, {64 * 128}, ScalarType::Byte);
  const int status = quantkit_copied_tile(x.const_data_ptr(), x.size(0), x.size(1), x.stride(0),
                                          static_cast<int>(at0), static_cast<int>(at1),
                                          out.mutable_data_ptr(), nullptr);
  check(status == 0, "copied_tile", "no driver makes this tensor map");
  return out;
}

Tensor product(const Tensor& tile, const Tensor& left, int64_t step) {
  const Tensor out = new_tensor(tile, {128, 64}, ScalarType::Int);
  quantkit_product(tile.const_data_ptr(), left.const_data_ptr(), static_cast<int>(step),
                   out.mutable_data_ptr(), nullptr);
  return out;
}

int64_t descriptor(int64_t address, int64_t bytes) {
  return static_cast<int64_t>(
      descriptor_of(static_cast<uint32_t>(address), static_cast<int>(bytes)));
}

void set_seed(int64_t seed) { emulation::set_seed(static_cast<uint64_t>(seed)); }
int64_t largest_block() { return emulation::largest_block(); }

}  // namespace
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("guarded", TORCH_BOX(&qk::cuda::guarded));
  m.impl("fault", TORCH_BOX(&qk::cuda::fault));
  m.impl("async_fault", TORCH_BOX(&qk::cuda::async_fault));
  m.impl("copied_tile", TORCH_BOX(&qk::cuda::copied_tile));
  m.impl("product", TORCH_BOX(&qk::cuda::product));
}

STABLE_TORCH_LIBRARY_IMPL(quantkit_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_seed", TORCH_BOX(&qk::cuda::set_seed));
  m.impl("descriptor", TORCH_BOX(&qk::cuda::descriptor));
  m.impl("largest_block", TORCH_BOX(&qk::cuda::largest_block));
}
