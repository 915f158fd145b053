"""SGLang serves with quantkit's kernels: its whole engine on this CPU, the plugin as SGLang finds it. Needs an
environment of its own: QUANTKIT_SGLANG_PYTHON names an interpreter that imports sglang; without one the tests are
skipped.

SGLang's CPU kernels (`sgl_kernel`) are compiled from source for machines with AMX. Where they are missing, a stand-in
whose functions raise takes their place, and SGLang's own torch code (attention: torch_native) runs in theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.calibration.dataset import load_tokenizer
from quantkit.evaluate import open_source
from quantkit.scoring import open_scorer

from .jobs import EXAMPLES, quantize_by

PYTHON = os.environ.get("QUANTKIT_SGLANG_PYTHON", "")
pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTKIT_SGLANG_PYTHON does not name an interpreter that imports sglang"),
]

STAND_IN = """
import sys, types
class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        def missing(*args, **kwargs):
            raise RuntimeError(f"{self.__name__}.{name} is not compiled here")
        return missing
sys.modules[__name__].__class__ = StandIn
for part in "flash_attn elementwise gemm moe kvcacheio sampling speculative attention quantization utils".split():
    module = sys.modules[f"{__name__}.{part}"] = StandIn(f"{__name__}.{part}")
    setattr(sys.modules[__name__], part, module)
__version__ = "0"
"""
# Prints the log probability of each token of a text, and greedy tokens.
SERVE = """
import json, sys
if __name__ == "__main__":
    import sglang
    ids = json.loads(sys.argv[2])
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", attention_backend="torch_native", sampling_backend="pytorch",
        dtype="bfloat16", max_total_tokens=2048, mem_fraction_static=0.2, max_running_requests=4,
        disable_cuda_graph=True, disable_radix_cache=True, disable_overlap_schedule=True, log_level="info")
    out = engine.generate(
        input_ids=[ids], sampling_params={"temperature": 0, "max_new_tokens": 8}, return_logprob=True,
        logprob_start_len=0)[0]
    print("SCORES " + json.dumps([[p[0] for p in out["meta_info"]["input_token_logprobs"][1:]], out["output_ids"]]))
    engine.shutdown()
"""
# Builds SGLang's own Linears from each folder's block and tensors, with its loaders, and saves what they make of x.
LAYERS = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.plugins import load_plugins
if __name__ == "__main__":
    load_plugins()
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
    from sglang.srt.layers.quantization import get_quantization_config
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
    set_global_server_args_for_scheduler(ServerArgs(model_path=sys.argv[3], device="cpu"))
    init_distributed_environment(
        world_size=1, rank=0, local_rank=0, backend="gloo", distributed_init_method="file://" + sys.argv[1])
    initialize_model_parallel()
    x = load_file(sys.argv[2])["x"]
    for folder in sys.argv[3:]:
        block = json.load(open(folder + "/config.json"))["quantization_config"]
        config = get_quantization_config(block["quant_method"]).from_config(block)
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        stored = load_file(folder + "/model.safetensors")
        prefix = "model.layers.0.self_attn."
        qkv = QKVParallelLinear(256, 64, 4, 2, bias=False, params_dtype=torch.float32,
                                quant_config=config, prefix=prefix + "qkv_proj")
        o = RowParallelLinear(256, 256, bias=False, params_dtype=torch.float32,
                              quant_config=config, prefix=prefix + "o_proj")
        for layer, parts in ((qkv, {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}), (o, {"o_proj": ()})):
            for part, shard in parts.items():
                for name, parameter in list(layer.named_parameters()):
                    parameter.weight_loader(parameter, stored[prefix + part + "." + name], *shard)
            layer.quant_method.process_weights_after_loading(layer)
        save_file({"qkv": qkv(x)[0].contiguous(), "o": o(x)[0].contiguous()}, folder + "/outputs.safetensors")
        print("LAYER", type(qkv.quant_method).__name__, type(qkv.scheme).__name__)
"""
# Which scheme the plugin gives, and where it registers its hook.
CHOOSE = """
import sys
import sglang.srt.utils as utils
from compressed_tensors.quantization import QuantizationArgs
from quantkit import ops
from quantkit.integrations import sglang as plugin
from quantkit.integrations.sglang_kernels import scheme_for
from sglang.srt.plugins.hook_registry import HookRegistry
cpu, cuda, reason = (eval(argument) for argument in sys.argv[1:])
utils.is_cpu, utils.is_cuda = (lambda: cpu), (lambda: cuda)
ops._load._status["cuda"] = ops._load.Library(path="_C_cuda", reason=reason)
plugin.register()
print("HOOKS", len(HookRegistry._hooks.get(plugin.TARGET, [])))
int4 = dict(num_bits=4, strategy="group", group_size=128)
token, fp8 = dict(num_bits=8, strategy="token", dynamic=True), dict(num_bits=8, type="float")
for weights, inputs, form in (
    (int4, None, "pack-quantized"),
    (int4 | {"actorder": "group"}, None, "pack-quantized"),
    (int4 | {"num_bits": 3}, None, "pack-quantized"),
    (int4, token | {"symmetric": False}, "pack-quantized"),
    (int4, token, "int-quantized"),
    (int4, token | {"type": "float"}, "pack-quantized"),
    (fp8 | {"strategy": "channel"}, None, "naive-quantized"),
    (fp8 | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}, None, "nvfp4-pack-quantized"),
):
    inputs = None if inputs is None else QuantizationArgs(**inputs)
    print("SCHEME", type(scheme_for(QuantizationArgs(**weights), inputs, form)).__name__)
"""
CASES = {
    "W8A8": ("W8A8", "QuantkitInt8Scheme"),
    "W8A8 static asymmetric": ("W8A8_STATIC_ASYM", "QuantkitInt8Scheme"),
    "FP8 per channel": ("FP8_DYNAMIC", "QuantkitFp8Scheme"),
    "FP8 static": ("FP8", "QuantkitFp8Scheme"),
    "FP8 per block": ("FP8_BLOCK", "QuantkitFp8Scheme"),
    "W4A16 asymmetric": ("W4A16_ASYM", "QuantkitPackedScheme"),
    "W8A16": ("W8A16", "QuantkitPackedScheme"),
    "W4A8": ("W4A8", "QuantkitPackedScheme"),
}
# Of these, what SGLang's engine serves; the mean change of a token's log probability that is allowed. Rounding inputs
# to 8 bit multiplies what bf16 leaves (0.009): another step here or there, and what follows is different.
SERVED = {"W8A8": 0.04, "FP8 per block": 0.06, "W4A16 asymmetric": 0.02, "W4A8": 0.04}


def python_path(folder: Path) -> str:
    """A folder for PYTHONPATH with quantkit and what an installation tells of its entry points."""
    folder.mkdir()
    (folder / "quantkit").symlink_to(Path(quantkit.__file__).parent)
    info = folder / "quantkit-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quantkit\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nquantkit = quantkit.integrations.sglang:register\n")
    if subprocess.run([PYTHON, "-c", "import sgl_kernel"], capture_output=True).returncode:
        (folder / "sgl_kernel").mkdir()
        (folder / "sgl_kernel" / "__init__.py").write_text(STAND_IN)
    return str(folder)


def ids_of_text() -> list[int]:
    text = (EXAMPLES / "data" / "evaluation.txt").read_text()[:700]
    return load_tokenizer(EXAMPLES / "models" / "tiny-llama").encode(text)


def run(command: list[str], paths: str, **environment: str) -> str:
    environment = os.environ | {"PYTHONPATH": paths, "SGLANG_USE_CPU_ENGINE": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def serve(model: Path, folder: Path, paths: str) -> tuple[list[float], list[int], str]:
    script = folder / "serve.py"
    script.write_text(SERVE)
    log = run([PYTHON, str(script), str(model), json.dumps(ids_of_text())], paths)
    lines = [line for line in log.splitlines() if line.startswith("SCORES ")]
    assert lines, f"SGLang did not serve {model}:\n{log[-3000:]}"
    logprobs, tokens = json.loads(lines[-1].removeprefix("SCORES "))
    return logprobs, tokens, log


def apart(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) > 150
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def logprobs_of(model: Path) -> list[float]:
    """What the checkpoint's codes mean: dequantized, inputs rounded as its config says, all else in fp32."""
    scorer, ids = open_scorer(model, "dequantized", progress=False), ids_of_text()
    return [logprob for logprob, _ in scorer.score([(ids[:i], ids[i : i + 1]) for i in range(1, len(ids))])]


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[int], list[float]]:
    """SGLang's log probabilities and tokens of the model before quantization, and the log probabilities in fp32."""
    folder, model = tmp_path_factory.mktemp("plain"), EXAMPLES / "models" / "tiny-llama"
    logprobs, tokens, log = serve(model, folder, python_path(folder / "plugins"))
    assert "quantkit: Quantkit" not in log
    return logprobs, tokens, logprobs_of(model)


def test_linears_of_sglang_multiply_what_the_codes_mean(tmp_path: Path) -> None:
    """Each kind of Linear, fused and not, made, loaded and called by SGLang; against products in fp64."""
    x = torch.randn(33, 256, generator=torch.Generator().manual_seed(0))
    x[3] *= 20
    save_file({"x": x}, tmp_path / "x.safetensors")
    models = []
    for scheme, _ in CASES.values():
        (tmp_path / scheme).mkdir()
        modifiers = f"{{QuantizationModifier: {{scheme: {scheme}}}}}"
        models.append(quantize_by("tiny-llama", modifiers, tmp_path / scheme))
    (tmp_path / "layers.py").write_text(LAYERS)
    command = [PYTHON, tmp_path / "layers.py", tmp_path / "rendezvous", tmp_path / "x.safetensors", *models]
    log = run([str(part) for part in command], python_path(tmp_path / "plugins"))
    lines = [line.split()[1:] for line in log.splitlines() if line.startswith("LAYER ")]
    assert lines == [["CompressedTensorsLinearMethod", kernel] for _, kernel in CASES.values()], log[-3000:]
    for model in models:
        source, found = open_source(model), load_file(model / "outputs.safetensors")
        for layer, parts in (("qkv", "qkv"), ("o", "o")):
            wanted = []
            for name in (f"model.layers.0.self_attn.{part}_proj" for part in parts):
                quantize = source.input_quantizers.get(name, lambda x: x)
                wanted.append(quantize(x).double() @ source.get(f"{name}.weight").double().T)
            exact = torch.cat(wanted, dim=1)
            # Codes are multiplied exactly or nearly so, and sums are in fp32.
            assert (found[layer] - exact).norm() < 1e-6 * exact.norm(), (model, layer)


@pytest.mark.parametrize("case", SERVED)
def test_sglang_serves_with_quantkits_kernels(
    case: str, tmp_path: Path, full_precision: tuple[list[float], list[int], list[float]]
) -> None:
    scheme, kernel = CASES[case]
    model = quantize_by("tiny-llama", f"{{QuantizationModifier: {{scheme: {scheme}}}}}", tmp_path)
    ours, tokens, log = serve(model, tmp_path, python_path(tmp_path / "plugins"))
    for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        assert f"quantkit: {kernel} for model.layers.3.{part}" in log, log[-3000:]
    plain, expected, plain32 = full_precision
    meant = logprobs_of(model)
    print(
        f"{case}: {apart(ours, meant):.4f} from what codes mean in fp32; from full precision {apart(ours, plain):.4f}"
        f", in fp32 {apart(meant, plain32):.4f}; full precision in bf16 and fp32 {apart(plain, plain32):.4f}"
    )
    assert apart(ours, meant) < SERVED[case]
    if case != "W4A8":
        assert tokens[:4] == expected[:4]


def test_the_hook_is_registered_where_it_is_asked_for(tmp_path: Path) -> None:
    """On a GPU only by QUANTKIT_SGLANG_CUDA (nothing is run there); what no kernel takes is left to SGLang."""
    paths = python_path(tmp_path / "plugins")

    def chosen(cpu: bool, cuda: bool, reason: str | None = None, **environment: str) -> str:
        return run([PYTHON, "-c", CHOOSE, repr(cpu), repr(cuda), repr(reason)], paths, **environment)

    log = chosen(True, False)
    schemes = [line.split()[1] for line in log.splitlines() if line.startswith("SCHEME ")]
    assert schemes == ["QuantkitPackedScheme", *["NoneType"] * 7], log[-3000:]
    assert "HOOKS 1" in log
    assert "HOOKS 1" in chosen(False, True, QUANTKIT_SGLANG_CUDA="1")
    assert "HOOKS 0" in chosen(False, True)
    assert "HOOKS 0" in chosen(False, True, "not compiled", QUANTKIT_SGLANG_CUDA="1")
    assert "QUANTKIT_SGLANG_CUDA must be 0 or 1, got 'x'" in chosen(False, True, QUANTKIT_SGLANG_CUDA="x")
