"""quantkit's ops: `torch.ops.quantkit.*` with documented Python wrappers. Imports nothing else of quantkit."""

from . import _load
from .attention import attention, sage_attention
from .awq import awq_search
from .bf16_gemm import bf16_gemm, bf16_rows, pack_bf16
from .error import quantization_error
from .fp4 import (
    e8m0_decode,
    e8m0_encode,
    e8m0_scale,
    nvfp4_global_scale,
    nvfp4_local,
    nvfp4_scale,
    quantize_fp4,
    unpack_fp4,
)
from .fp8_gemm import fp8_gemm, pack_fp8
from .gptq import factor_with_retry, gptq_factor, gptq_sweep
from .gram import gram_accumulate, gram_upper, mirror_upper
from .histogram import HISTOGRAM_BINS, histogram_accumulate, merge_histograms
from .histogram_scale import histogram_scale
from .int8_mixed import int8_mixed_gemm
from .kv_cache import kv_append, kv_attention, kv_read
from .moe import combine_experts, moe_gemm, sort_by_expert
from .pack import pack_int32, pack_zero_points, unpack_int32, unpack_zero_points
from .pointwise import add_rms_norm, rms_norm, rms_norm_quant, rotary_embedding, silu_mul, silu_mul_quant
from .quantize import FP8_MAX, dequantize, fp8_quant_per_token, int8_quant_per_token, quantize_fp8, quantize_int
from .reduce import absmax, minmax
from .rtn import rtn_fp8, rtn_int
from .scale import MIN_SCALE, asymmetric_scale, symmetric_scale
from .search import mse_scale, percentile_scale
from .smooth import smoothquant_scales
from .w4a8 import pack_w4a8, pack_w4a8_scales, w4a8_gemm
from .w8a8 import int8_gemm, pack_w8a8, w8a8_gemm
from .wna16 import pack_wna16, pack_wna16_scales, wna16_gemm

_load.load_libraries()

__all__ = [
    "FP8_MAX",
    "HISTOGRAM_BINS",
    "MIN_SCALE",
    "absmax",
    "add_rms_norm",
    "asymmetric_scale",
    "attention",
    "awq_search",
    "bf16_gemm",
    "bf16_rows",
    "combine_experts",
    "dequantize",
    "e8m0_decode",
    "e8m0_encode",
    "e8m0_scale",
    "factor_with_retry",
    "fp8_gemm",
    "fp8_quant_per_token",
    "gptq_factor",
    "gptq_sweep",
    "gram_accumulate",
    "gram_upper",
    "histogram_accumulate",
    "histogram_scale",
    "int8_gemm",
    "int8_mixed_gemm",
    "int8_quant_per_token",
    "kv_append",
    "kv_attention",
    "kv_read",
    "merge_histograms",
    "minmax",
    "mirror_upper",
    "moe_gemm",
    "mse_scale",
    "nvfp4_global_scale",
    "nvfp4_local",
    "nvfp4_scale",
    "pack_bf16",
    "pack_fp8",
    "pack_int32",
    "pack_w4a8",
    "pack_w4a8_scales",
    "pack_w8a8",
    "pack_wna16",
    "pack_wna16_scales",
    "pack_zero_points",
    "percentile_scale",
    "quantization_error",
    "quantize_fp4",
    "quantize_fp8",
    "quantize_int",
    "rms_norm",
    "rms_norm_quant",
    "rotary_embedding",
    "rtn_fp8",
    "rtn_int",
    "sage_attention",
    "silu_mul",
    "silu_mul_quant",
    "smoothquant_scales",
    "sort_by_expert",
    "symmetric_scale",
    "unpack_fp4",
    "unpack_int32",
    "unpack_zero_points",
    "w4a8_gemm",
    "w8a8_gemm",
    "wna16_gemm",
]
