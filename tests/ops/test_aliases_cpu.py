"""vLLM's and SGLang's ops for CPUs, and vLLM's cache: plain torch, and vLLM's own kernels where there are some."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from .test_aliases_gemm import assert_product, codes, scales
from .test_aliases_quantize import E4M3, INT8, Q, as_fp8, assert_codes, x_of
from .test_aliases_weight_only import Weight, pack

pytestmark = pytest.mark.usefixtures("opchecked")

M, N, K = 5, 128, 256


def test_handlers() -> None:
    a, w = codes(M, K, INT8, 0), codes(N, K, INT8, 1)
    sa, sb, bias = scales(M, 1), scales(1, N), x_of(1, N)[0]
    handler = torch.tensor(Q.create_onednn_scaled_mm_handler(w.t(), sb, torch.bfloat16, True, True, 32))
    azp = torch.tensor([[-3], [120], [0], [300], [-500]], dtype=torch.int32)
    out = torch.empty(M, N, dtype=torch.bfloat16)
    for offset in (None, azp):
        adjustment = None if offset is None else w.sum(1, dtype=torch.float32) * sb
        Q.onednn_scaled_mm(out, a, sa, offset, adjustment, bias, handler)
        shifted = a.double() - (0 if offset is None else offset.double())
        exact = shifted @ w.double().t() * (sa.double() * sb.double())
        assert_product(out, exact + bias.double(), exact.abs(), 1)
    Q.release_dnnl_matmul_handler(int(handler))
    with pytest.raises(RuntimeError, match="quantkit::onednn_scaled_mm: no such handler"):
        Q.onednn_scaled_mm(out, a, sa, None, None, None, handler)


def test_packed_weights() -> None:
    x, bias = x_of(M, K), torch.randn(N)
    w, sb = codes(N, K, INT8, 1), scales(N)
    packed = Q.convert_weight_packed(w)
    made, steps = Q.per_token_quant_int8_cpu(x)
    exact = (made.double() - 128) @ w.double().t() * steps.double()[:, None] * sb.double() + bias.double()
    for weight, vnni in ((w, False), (packed, True)):
        one = Q.int8_scaled_mm_with_quant(x, weight, sb, bias, torch.bfloat16, vnni)
        other = Q.int8_scaled_mm_cpu(made, weight, steps, sb, bias, torch.bfloat16, vnni)
        for y in (one, other):
            assert_product(y, exact, exact.abs(), 1)
    f, grid = codes(N, K, E4M3, 1), scales(1, 2)
    values = f.double() * grid.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    for weight, vnni in ((f, False), (Q.convert_weight_packed(f), True)):
        y = Q.fp8_scaled_mm_cpu(x, weight, grid, [128, 128], bias, torch.bfloat16, vnni)
        exact = x.double() @ values.t() + bias.double()
        assert_product(y, exact, x.double().abs() @ values.abs().t(), K)
    b = x_of(N, K, seed=4)
    for weight, vnni in ((b, False), (Q.convert_weight_packed(b), True)):
        y = Q.weight_packed_linear(x, weight, None, vnni)
        assert_product(y, x.double() @ b.double().t(), x.double().abs() @ b.double().abs().t(), K)
    assert torch.equal(Q.convert_weight_packed(torch.stack((w, w)))[1], packed)
    with pytest.raises(RuntimeError, match="must have a multiple of 64 rows, got 100"):
        Q.convert_weight_packed(b[:100])


@pytest.mark.parametrize("name", ["auto", "fp8", "fp8_e4m3"])
def test_cache(name: str) -> None:
    key, value = x_of(6, 2 * 16).view(6, 2, 16), x_of(6, 2 * 16, seed=1).view(6, 2, 16)
    kind = torch.bfloat16 if name == "auto" else torch.uint8
    ks, vs = torch.tensor(0.05), torch.tensor([0.1])
    for slots in ([5, -1, 0, 11, -1, 7], [-1] * 6, []):
        caches = [torch.full((3, 2, 4, 16), 7).to(kind).transpose(1, 2) for _ in range(2)]  # heads outside tokens
        wanted = [c.clone() for c in caches]
        Q.reshape_and_cache_flash(key, value, *caches, torch.tensor(slots, dtype=torch.int64), name, ks, vs)
        for cache, plain, new, scale in zip(caches, wanted, (key, value), (ks, vs), strict=True):
            rows = new if name == "auto" else as_fp8(new.float() * (1 / scale)).view(torch.uint8)
            for t, slot in enumerate(slots):
                if slot >= 0:
                    plain[slot // 4, slot % 4] = rows[t]
            assert torch.equal(cache, plain)
    with pytest.raises(RuntimeError, match="kv_cache_dtype 'fp8_e5m2' is not offered"):
        Q.reshape_and_cache_flash(key, value, *caches, torch.tensor([1]), "fp8_e5m2", ks, vs)


def test_convert_fp8() -> None:
    x = x_of(6, 32).view(3, 2, 32)
    made, back = torch.empty(3, 2, 32, dtype=torch.uint8), torch.empty_like(x)
    Q.convert_fp8(made, x, 0.5, "fp8")
    assert_codes(made.view(E4M3), as_fp8(x.float() * 2))
    Q.convert_fp8(back, made, 0.5, "fp8")
    assert torch.equal(back, (made.view(E4M3).float() * 0.5).bfloat16())


PEER = """
import sys, torch, vllm.platforms
from vllm.platforms import current_platform
current_platform.import_kernels()
C = torch.ops._C
given = torch.load(sys.argv[1])
x, w, r = given["x"], given["norm"], given["residual"]
out = {}
def new(*shape, dtype=torch.bfloat16): return torch.empty(*shape, dtype=dtype)
q, s, z = new(*x.shape, dtype=torch.int8), new(len(x), 1, dtype=torch.float32), new(len(x), 1, dtype=torch.int32)
C.dynamic_scaled_int8_quant(q, x, s, None); out["dynamic"] = (q.clone(), s.clone())
C.dynamic_scaled_int8_quant(q, x.abs() + 5, s, z); out["dynamic azp"] = (q.clone(), s.clone(), z.clone())
C.static_scaled_int8_quant(q, x, given["step"], None); out["static"] = (q.clone(),)
C.static_scaled_int8_quant(q, x, given["step"], given["azp"]); out["static azp"] = (q.clone(),)
y = new(len(x), x.shape[1] // 2); C.silu_and_mul(y, x); out["silu"] = (y,)
a, b = x.clone(), r.clone(); C.fused_add_rms_norm(a, b, w, 1e-5); out["add norm"] = (a, b)
y = new(len(x), given["scale"].shape[1])
C.cpu_gemm_wna16(x, given["blocks"], y, given["scale"], given["zeros"], given["bias"], 8, "vec"); out["wna16"] = (y,)
handler = torch.tensor(C.create_onednn_scaled_mm_handler(given["b"].t(), given["sb"], torch.bfloat16, True, True, 32))
y = new(len(x), len(given["b"])); a = new(*x.shape, dtype=torch.int8)
C.dynamic_scaled_int8_quant(a, x, s, z)
C.onednn_scaled_mm(y, a, s, z, given["adj"], given["bias"], handler); out["scaled mm"] = (y,)
torch.save(out, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not os.environ.get("QUANTKIT_VLLM_PYTHON"), reason="QUANTKIT_VLLM_PYTHON names no Python with vLLM")
def test_like_vllm(tmp_path: Path) -> None:
    """The same calls to vLLM's kernels, in its own environment."""
    x, weight = x_of(M, K), Weight(4, True)
    blocks = pack(weight.codes, 4, 1).view(K, -1, 2).permute(1, 0, 2).reshape(-1, K * 2).contiguous()
    b, sb = codes(N, K, INT8, 1), scales(1, N)
    given = {
        "x": x,
        "norm": x_of(1, K, seed=5)[0],
        "residual": x_of(M, K, seed=6),
        "step": torch.tensor([0.05]),
        "azp": torch.tensor([-20], dtype=torch.int32),
        "blocks": blocks,
        "scale": weight.scale.bfloat16(),
        "zeros": weight.qzeros(0),
        "bias": x_of(1, N, seed=7)[0],
        "b": b,
        "sb": sb,
        "adj": b.sum(1, dtype=torch.float32)[None] * sb,
    }
    torch.save(given, tmp_path / "in.pt")
    (tmp_path / "peer.py").write_text(PEER)
    command = [os.environ["QUANTKIT_VLLM_PYTHON"], "peer.py", "in.pt", "out.pt"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_PLUGINS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "out.pt")

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    q, s, z = new(M, K, dtype=INT8), new(M, 1, dtype=torch.float32), new(M, 1, dtype=torch.int32)
    Q.dynamic_scaled_int8_quant(q, x, s, None)
    assert_codes(q, theirs["dynamic"][0])
    torch.testing.assert_close(s, theirs["dynamic"][1], rtol=1e-6, atol=0)
    Q.dynamic_scaled_int8_quant(q, x.abs() + 5, s, z)
    assert_codes(q, theirs["dynamic azp"][0])
    torch.testing.assert_close(s, theirs["dynamic azp"][1], rtol=1e-6, atol=0)
    assert int((z - theirs["dynamic azp"][2]).abs().max()) <= 1
    for name, azp in (("static", None), ("static azp", given["azp"])):
        Q.static_scaled_int8_quant(q, x, given["step"], azp)
        assert_codes(q, theirs[name][0])
    Q.silu_and_mul(y := new(M, K // 2), x)
    torch.testing.assert_close(y, theirs["silu"][0], rtol=2**-7, atol=2**-12)
    a, r = x.clone(), given["residual"].clone()
    Q.fused_add_rms_norm(a, r, given["norm"], 1e-5)
    torch.testing.assert_close(a, theirs["add norm"][0], rtol=2**-6, atol=2**-10)
    assert torch.equal(r, theirs["add norm"][1])
    Q.cpu_gemm_wna16(x, blocks, y := new(M, N), given["scale"], given["zeros"], given["bias"], 8, "vec")
    # vLLM rounds each weight to bf16 first.
    size = float((x.double().abs() @ weight.values.abs()).max())
    torch.testing.assert_close(y, theirs["wna16"][0], rtol=2**-7, atol=2**-8 * size)
    handler = torch.tensor(Q.create_onednn_scaled_mm_handler(b.t(), sb, torch.bfloat16, True, True, 32))
    Q.dynamic_scaled_int8_quant(q, x, s, z)
    Q.onednn_scaled_mm(y, q, s, z, given["adj"], given["bias"], handler)
    Q.release_dnnl_matmul_handler(int(handler))
    # Codes may differ by a step where x / scale is a tie.
    steps = float((s * sb).max()) * 128 * 3
    torch.testing.assert_close(y, theirs["scaled mm"][0], rtol=2**-7, atol=steps)
