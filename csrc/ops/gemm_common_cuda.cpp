// What the GEMMs on CUDA share.
#include <cstdlib>
#include <string_view>

#include "ops/gemm_cuda.h"

#if QUANTKIT_CUDA_SM90
#include "cuda/sm90/gemm.h"
#endif

namespace qk::cuda {

Experts ExpertRows::experts() const {
  if (!offsets) return {nullptr, false, 0};
  return {offsets->const_data_ptr(), offsets->scalar_type() == ScalarType::Long,
          static_cast<int>(count())};
}

void check_experts(const char* op, const Tensor& x, const ExpertRows& rows, int64_t out_features) {
  check_input(op, x);
  const Tensor& offsets = *rows.offsets;
  const ScalarType dtype = offsets.scalar_type();
  check(offsets.dim() == 1 && offsets.size(0) >= 1 &&
            (dtype == ScalarType::Long || dtype == ScalarType::Int),
        op, "offsets must be torch.int64 or torch.int32 [experts + 1], got ", name_of(dtype), " ",
        text_of(offsets.sizes()));
  check_contiguous(op, "offsets", offsets);
  check_same_device(op, "offsets", offsets, x);
  check(rows.count() > 0 || x.size(0) == 0, op, "offsets must rise from 0 to x's ", x.size(0),
        " rows, got no expert");
  if (rows.row_scale) {
    const Tensor& scale = *rows.row_scale;
    check(scale.scalar_type() == ScalarType::Float && has_shape(scale, {x.size(0)}) &&
              scale.is_contiguous(),
          op, "row_scale must be contiguous torch.float32 [", x.size(0), "], got ",
          name_of(scale.scalar_type()), " ", text_of(scale.sizes()));
    check_same_device(op, "row_scale", scale, x);
  }
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
}

void check_stack(const char* op, const char* name, const OptionalTensor& stack,
                 const ExpertRows& rows) {
  if (!stack) return;
  check(stack->dim() >= 1 && stack->size(0) == rows.count() && stack->is_contiguous(), op, name,
        " must be contiguous, one for each of ", rows.count(), " experts (offsets), got ",
        text_of(stack->sizes()));
}

GemmArgs gemm_args(const char* op, const Tensor& x, const Tensor& out, const Tensor& packed,
                   int64_t word_rows, const OptionalTensor& bias, const ExpertRows& rows) {
  check(on_device(x), op, "x must be on a CUDA device");
  check_same_device(op, "packed", packed, x);
  if (bias) check_same_device(op, "bias", *bias, x);
  check(packed.numel() == 0 || reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0, op,
        "packed must begin at a multiple of 16 bytes: call .clone() on this view");
  // Bytes of a row, and packed words by their rows, are counted in 32 bits.
  constexpr int64_t kLongest = int64_t{1} << 28;
  check(x.size(0) <= kLongest && x.size(1) <= kLongest && out.size(1) <= kLongest, op, "x ",
        text_of(x.sizes()), " by ", out.size(1),
        " rows of the weight are too many; the CUDA "
        "kernels take at most ",
        kLongest, " of each extent");
  const int64_t panels = gemm_panels(out.size(1)), experts = rows ? rows.count() : 1;
  const int64_t words = packed.numel() * static_cast<int64_t>(packed.element_size()) / 4;
  GemmArgs args = {};
  args.a.rows = static_cast<int>(x.size(0));
  args.a.depth = static_cast<int>(x.size(1));
  args.a.planes = 1;
  args.weight = {packed.const_data_ptr(), static_cast<int>(word_rows),
                 panels * experts > 0 ? words / (panels * experts) : 0,
                 experts > 0 ? words / experts : 0, static_cast<int>(out.size(1))};
  args.experts = rows.experts();
  args.out.data = out.mutable_data_ptr();
  args.out.sums = out.scalar_type() == ScalarType::Int;
  args.out.dtype = args.out.sums ? DType::kInt8 : dtype_of(op, out.scalar_type());
  if (bias) {
    args.out.bias = bias->const_data_ptr();
    args.out.bias_dtype = dtype_of(op, bias->scalar_type());
  }
  args.out.row_scale = pointer<float>(rows.row_scale);
  args.groups.rows = args.groups.columns = args.groups.input_columns = 1 << 30;
  args.groups.groups = 1;
  return args;
}

StagedInput stage_input(const char* op, const Tensor& x, WeightKind kind,
                        const OptionalTensor& perm, const ExpertRows& rows, GemmArgs& args) {
  const Matrix matrix = matrix_of(op, "x", x);
  const bool bytes = matrix.dtype == DType::kInt8, narrow = matrix.dtype == DType::kFloat16;
  // bf16 numbers in so many that they are x's together.
  int planes = 1;
  if (matrix.dtype == DType::kFloat32) planes = 3;
  if (narrow && kind == WeightKind::kBFloat16) planes = 2;
  const DType dtype = bytes || (narrow && planes == 1) ? matrix.dtype : DType::kBFloat16;
  const int64_t width = bytes ? 1 : 2;
  args.a.planes = planes;
  const bool aligned = reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
                       (matrix.rows == 1 || matrix.row_stride * width % 16 == 0);
  if (planes == 1 && !perm && aligned && (matrix.col_stride == 1 || matrix.cols == 1)) {
    args.a.data = matrix.data;
    args.a.row_bytes = matrix.row_stride * width;
    return {x, dtype};
  }
  const int64_t row_bytes = row_bytes_of(matrix.cols * width);
  const int64_t plane_bytes = row_bytes * matrix.rows;
  const Tensor staged = new_tensor(x, {planes * plane_bytes}, ScalarType::Char);
  args.a.data = staged.const_data_ptr();
  args.a.row_bytes = row_bytes;
  args.a.plane_bytes = plane_bytes;
  if (matrix.cols > 0) {
    const StagedRows how{
        matrix,      rows.experts(), pointer<int32_t>(perm), data<void>(staged), row_bytes,
        plane_bytes, planes};
    check_launch(op, stage_rows(how, current_stream(x)));
  }
  return {staged, dtype};
}

namespace {

// The highest architecture whose kernels may be taken, and whether by QUANTKIT_CUDA_GEMM: then they
// are wherever they can.
struct Floor {
  int arch;
  bool wanted;
};
Floor floor_of(const char* op, const Tensor& like) {
  const int device = compute_capability(like);
  const char* const variable = std::getenv("QUANTKIT_CUDA_GEMM");
  const std::string_view wanted = variable ? variable : "";
  if (wanted.empty()) return {device, false};
  check(wanted == "sm80" || wanted == "sm89" || wanted == "sm90", op,
        "QUANTKIT_CUDA_GEMM must be sm80, sm89 or sm90, got ", wanted);
  const int arch = wanted == "sm80" ? 80 : wanted == "sm89" ? 89 : 90;
  return {arch < device ? arch : device, true};
}

}  // namespace

bool takes_float8_codes(const char* op, const GemmArgs& args, const Tensor& like) {
  return floor_of(op, like).arch >= 89 && args.groups.segment % kFloat8Segment == 0;
}

#if QUANTKIT_CUDA_SM90

bool takes_sm90(const char* op, WeightKind kind, DType dtype, const GemmArgs& args,
                const Tensor& like) {
  const Floor floor = floor_of(op, like);
  if (floor.arch != 90 || !sm90::takes(kind, dtype, args)) return false;
  return floor.wanted || sm90::pays(kind, args);
}

void run_gemm(const char* op, WeightKind kind, DType dtype, const GemmArgs& args,
              const Tensor& like) {
  const bool many = takes_sm90(op, kind, dtype, args, like);
  const GemmPlan plan = many ? sm90::plan_gemm(kind, dtype, args) : plan_gemm(kind, dtype, args);
  const Tensor workspace = new_tensor(like, {plan.workspace}, ScalarType::Int);
  const auto run = many ? sm90::gemm : gemm;
  check_launch(op,
               run(kind, dtype, args, plan, workspace.mutable_data_ptr(), current_stream(like)));
}

#else

bool takes_sm90(const char*, WeightKind, DType, const GemmArgs&, const Tensor&) { return false; }

void run_gemm(const char* op, WeightKind kind, DType dtype, const GemmArgs& args,
              const Tensor& like) {
  const GemmPlan plan = plan_gemm(kind, dtype, args);
  const Tensor workspace = new_tensor(like, {plan.workspace}, ScalarType::Int);
  check_launch(op,
               gemm(kind, dtype, args, plan, workspace.mutable_data_ptr(), current_stream(like)));
}

#endif

}  // namespace qk::cuda
