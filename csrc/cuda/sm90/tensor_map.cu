// Tensor maps are encoded by the driver, whose function is asked for at run time: nothing links
// against libcuda, so that the library also loads where there is none.
#include "cuda/sm90/tensor_map.h"

namespace qk::cuda::sm90 {

#ifdef __CUDACC__

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

cudaError_t make_tensor_map(const TensorShape& shape, TensorMap* map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t extent[4], stride[4];
  cuuint32_t box[4], step[4];
  for (int d = 0; d < shape.rank; ++d) {
    extent[d] = static_cast<cuuint64_t>(shape.extent[d]);
    stride[d] = static_cast<cuuint64_t>(shape.stride[d]);
    box[d] = static_cast<cuuint32_t>(shape.box[d]);
    step[d] = 1;
  }
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, static_cast<cuuint32_t>(shape.rank),
             const_cast<void*>(shape.data), extent, stride + 1, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#else

// What the driver refuses.
cudaError_t make_tensor_map(const TensorShape& shape, TensorMap* map) {
  if (reinterpret_cast<uintptr_t>(shape.data) % 16 != 0 || shape.box[0] != kTileRowBytes)
    return cudaErrorInvalidValue;
  for (int d = 0; d < shape.rank; ++d) {
    if (shape.extent[d] <= 0 || shape.extent[d] > int64_t{1} << 32) return cudaErrorInvalidValue;
    if (shape.box[d] <= 0 || shape.box[d] > 256) return cudaErrorInvalidValue;
    // Strides that let rows overlap are left alone: no document says that a driver takes them.
    const int64_t least = d < 2 ? shape.extent[0] : 1;
    if (d > 0 && (shape.stride[d] % 16 != 0 || shape.stride[d] < least ||
                  shape.stride[d] >= int64_t{1} << 40)) {
      return cudaErrorInvalidValue;
    }
  }
  map->shape = shape;
  return cudaSuccess;
}

#endif

}  // namespace qk::cuda::sm90
