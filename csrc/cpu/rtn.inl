// The table of rtn.h for one ISA.
#include "cpu/rtn_impl.h"

namespace qk::QK_ISA {
namespace {

void rtn_int(DType dtype, const RtnInt& how, const BlockRow& block, void* scratch) {
  visit_float(dtype, [&]<class T>(T) { block_row_rtn_int<T>(how, block, scratch); });
}

void rtn_fp8(DType dtype, DType format, const BlockRow& block, void* scratch) {
  visit_float(dtype, [&]<class T>(T) {
    visit_fp8(format, [&](auto fp8) { block_row_rtn_fp8<T>(fp8, block, scratch); });
  });
}

}  // namespace

extern const RtnKernels rtn;
const RtnKernels rtn = {rtn_int, rtn_fp8};

}  // namespace qk::QK_ISA
