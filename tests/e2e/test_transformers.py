"""A real client: Transformers with compressed-tensors loads every output, and computes what the codes say.

The oracle is the source model in Transformers with our dequantized weights put in, and its Linear inputs rounded by
the client's own rule, written down here. What remains between the two is the order of fp32 sums; where activations are
rounded, that order decides a few codes that lie within an ulp of a tie.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from quantkit import load
from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.schemes import QuantizationArgs
from quantkit.conformance import check_folder
from quantkit.formats.source import WeightSource

from .jobs import EXAMPLES, RECIPES, SCHEMES, quantize, quantize_by

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

# Mean |difference| of logits over their spread: fp32 summation order, and a few activation codes off by one.
WEIGHT_ONLY, WITH_ACTIVATIONS = 1e-6, 1e-3


def logits(model: torch.nn.Module, cache: object = None) -> torch.Tensor:
    ids = torch.arange(3, 131).reshape(2, 64)
    with torch.inference_mode():
        return model(input_ids=ids, past_key_values=cache).logits.float()


def rounded(x: torch.Tensor, args: QuantizationArgs, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """What compressed-tensors makes of a Linear's input: 127.5 steps to a dynamic symmetric range, codes to -128."""
    blocks = x.reshape(-1, args.group_size or x.shape[-1])
    if args.scales != "float":
        return micro(blocks, args, stored).to(x.dtype).reshape(x.shape)
    zero = stored.get("input_zero_point", torch.zeros(())).float()
    if args.dynamic and not args.symmetric:
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255.0
        zero = torch.round((-128 - low / scale).clamp(-128, 127))
    elif args.dynamic:
        amax = blocks.abs().amax() if args.strategy == "tensor" else blocks.abs().amax(-1, keepdim=True)
        scale = amax / (448.0 if args.type == "float" else 127.5)
    else:
        scale = stored["input_scale"]
    if args.type == "float":
        codes = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        codes = torch.round((blocks / scale + zero).clamp(-128, 127))
    return ((codes - zero) * scale).reshape(x.shape)


def micro(blocks: torch.Tensor, args: QuantizationArgs, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same of MX and NVFP4, in numbers: to the nearest of all that a code can be, ties to an even one."""
    largest = 6.0 if args.fp4 else 448.0
    amax = blocks.abs().amax(-1, keepdim=True)
    if args.scales == "nvfp4":
        divisor = stored["input_global_scale"]
        local = (amax / 6.0 * divisor).clamp(max=448).to(torch.float8_e4m3fn).float()
        scale = torch.where(local == 0, 0.125, local) / divisor
    else:
        # A power of two: amax gets below 7 or 448, and to no less than half of it.
        scale = 2.0 ** torch.log2(amax.float() / (7.0 if args.fp4 else 448.0)).floor().add(1)
    values = (blocks / scale).float().clamp(-largest, largest)
    if not args.fp4:
        return values.to(torch.float8_e4m3fn).float() * scale
    grid = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0])  # even ones first: argmin takes the first of equals
    return grid[(values.abs().unsqueeze(-1) - grid).abs().argmin(-1)] * values.sign() * scale.float()


class RoundedCache(transformers.DynamicCache):
    """Keys and values as compressed-tensors holds them: codes -128 to 127, or e4m3, with the stored scales."""

    def __init__(self, checkpoint: Checkpoint, args: QuantizationArgs) -> None:
        super().__init__()
        self.float = args.type == "float"
        names = [name for name in checkpoint.tensors if name.endswith(("k_scale", "v_scale"))]
        self.scales = {name: checkpoint.tensor(name).float().clone() for name in names}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: object) -> tuple:  # type: ignore
        prefix = f"model.layers.{layer}.self_attn"
        return super().update(self.held(keys, f"{prefix}.k_scale"), self.held(values, f"{prefix}.v_scale"), layer)

    def held(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = self.scales[name]
        if self.float:
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return torch.round((x / scale).clamp(-128, 127)) * scale


def oracle(source: Path, output: Path, dtype: torch.dtype) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    with Checkpoint(output) as checkpoint:
        weights = WeightSource(checkpoint)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # smoothing changes them
                parameter.data = checkpoint.tensor(name).to(dtype)
        for name in weights.modules:
            activations = weights.schemes[name].input_activations
            linear = model.get_submodule(name)
            linear.weight.data = weights.get(f"{name}.weight").to(dtype, copy=True)
            stored = {
                part: checkpoint.tensor(f"{name}.{part}").clone()
                for part in ("input_scale", "input_zero_point", "input_global_scale")
                if f"{name}.{part}" in checkpoint.tensors
            }
            if activations is not None:
                linear.register_forward_pre_hook(lambda _, args, a=activations, s=stored: (rounded(args[0], a, s),))
        cache = RoundedCache(checkpoint, weights.kv_cache) if weights.kv_cache is not None else None
        for attention, quantizers in weights.cache_quantizers.items():
            assert cache is not None
            for quantize, name in zip(quantizers, (f"{attention}.k_scale", f"{attention}.v_scale"), strict=True):
                x = (torch.randn(3, 2, 5, 32) * 40).clamp(-127, 127) * cache.scales[name]
                assert torch.equal(quantize(x), cache.held(x, name)), "what `eval` does with the cache"
    return logits(model, cache)


@pytest.mark.parametrize("scheme", [*SCHEMES, *RECIPES])
def test_transformers_computes_what_the_codes_say(scheme: str, tmp_path: Path) -> None:
    if scheme == "groups in order" and version("compressed-tensors") >= "0.19":
        pytest.skip("compressed-tensors 0.19 and later refuse g_idx")
    source = EXAMPLES / "models" / "tiny-llama"
    if scheme in SCHEMES:
        output = quantize("tiny-llama", scheme, tmp_path)
    else:
        output = quantize_by("tiny-llama", RECIPES[scheme], tmp_path)
    assert check_folder(output, "transformers", hardware="cpu").ok
    # The client dequantizes MX and NVFP4 to bf16, whatever the rest of the model is in.
    dtype = torch.bfloat16 if scheme.startswith(("MXFP", "NVFP")) else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=dtype).eval()
    got, expected = logits(model), oracle(source, output, dtype)
    spread = expected.std()
    error = float((got - expected).abs().mean() / spread)
    with Checkpoint(output) as checkpoint:
        weights = WeightSource(checkpoint)
        scales = [checkpoint.tensor(f"{name}.weight_scale").float() for name in weights.modules]
        assert all(bool((scale < 0).any()) == (scheme == "negative scales") for scale in scales)
        limit = WITH_ACTIVATIONS if weights.input_quantizers or weights.kv_cache is not None else WEIGHT_ONLY
    assert error < limit, f"{error:.2e} of the logits' spread"
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    assert (got - logits(plain)).abs().mean() > 10 * limit * spread, "the output is not quantized at all"
    print(f"{scheme}: {error:.2e}")


ATTENTION = "attention: {targets: [Attention], input_activations: {num_bits: 8, type: float, strategy: attn_head}}"
FP8_LINEARS = (
    "linears: {targets: ['%s'], weights: {num_bits: 8, type: float, strategy: channel}, "
    "input_activations: {num_bits: 8, type: float, strategy: token, dynamic: true}}"
)
INT4_LINEARS = "linears: {targets: ['%s'], weights: {num_bits: 4, group_size: 32}}"


@pytest.mark.parametrize(
    ("groups", "read"),
    [
        (ATTENTION, False),
        (f"{FP8_LINEARS % 're:.*attn.*'}, {ATTENTION}", True),
        (f"{INT4_LINEARS % 'Linear'}, {ATTENTION}", True),
        (INT4_LINEARS % "re:.*attn.*", False),
    ],
)
def test_the_checker_tells_of_experts_that_are_made_anew(groups: str, read: bool, tmp_path: Path) -> None:
    output = quantize_by("tiny-moe", f"{{QuantizationModifier: {{config_groups: {{{groups}}}}}}}", tmp_path)
    ids = torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.inference_mode():
        got, expected = (model(ids, use_cache=True).logits for model in (theirs, load(output, dtype=torch.float32)))
    off = float((got - expected).abs().mean() / expected.std())
    # Activations rounded one code apart, which routes tokens elsewhere; or other experts.
    assert off < 0.1 if read else off > 0.5
    verdict = check_folder(output, "transformers")
    assert verdict.ok is read and ("makes anew" in verdict.render()) is not read, verdict.render()
