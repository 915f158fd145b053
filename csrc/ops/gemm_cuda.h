// What the GEMMs on CUDA share: experts, activations that the kernels can read, the launch.
#pragma once

#include "cuda/common/gemm.h"
#include "cuda/common/gemm_rows.h"
#include "ops/cuda_tensor.h"
#include "ops/gemm_check.h"

namespace qk::cuda {

// Rows sorted by expert, and what multiplies them; without `offsets` there is one weight for all.
struct ExpertRows {
  OptionalTensor offsets, row_scale;

  explicit operator bool() const { return offsets.has_value(); }
  int64_t count() const { return offsets ? offsets->size(0) - 1 : 0; }
  Experts experts() const;
};

// Checks x, offsets and row_scale of an op over experts. What the offsets are is not looked at: the
// host does not wait for the device.
void check_experts(const char* op, const Tensor& x, const ExpertRows& rows, int64_t out_features);

// A part of `stack` for each expert.
void check_stack(const char* op, const char* name, const OptionalTensor& stack,
                 const ExpertRows& rows);

// The first expert's part, for the checks of the op for one weight.
inline Tensor first_part(const Tensor& stack) { return torch::stable::select(stack, 0, 0); }
inline OptionalTensor first_part(const OptionalTensor& stack) {
  return stack ? OptionalTensor(first_part(*stack)) : std::nullopt;
}
inline OptionalTensor first_number(const OptionalTensor& stack) {
  Tensor copy = stack ? *stack : Tensor();
  return stack ? OptionalTensor(torch::stable::narrow(copy, 0, 0, 1)) : std::nullopt;
}

// The arguments that all products have, for x [M, K] and results in `out` [M, N].
GemmArgs gemm_args(const char* op, const Tensor& x, const Tensor& out, const Tensor& packed,
                   int64_t word_rows, const OptionalTensor& bias, const ExpertRows& rows);

// Points args at 16-bit numbers that are x's columns in the order of `perm`: x itself if the
// kernels can read it, else a copy, which the tensor given back holds. Gives the kernels' dtype.
struct StagedInput {
  Tensor held;
  DType dtype;
};
StagedInput stage_input(const char* op, const Tensor& x, WeightKind kind,
                        const OptionalTensor& perm, const ExpertRows& rows, GemmArgs& args);

// Whether the kernels of sm_90 multiply these: the device is one, there is such a kernel, and rows
// are many. QUANTKIT_CUDA_GEMM says otherwise: sm80 and sm89 allow kernels of these and below, sm90
// takes them for any rows. `args` may lack the activations' place.
bool takes_sm90(const char* op, WeightKind kind, DType dtype, const GemmArgs& args,
                const Tensor& like);

// Whether FP8 codes can be multiplied as they are, by the kernels of sm_89.
bool takes_float8_codes(const char* op, const GemmArgs& args, const Tensor& like);

void run_gemm(const char* op, WeightKind kind, DType dtype, const GemmArgs& args,
              const Tensor& like);

// Bytes of a row of so many, its beginnings aligned.
inline int64_t row_bytes_of(int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

}  // namespace qk::cuda
