"""Checkpoints that other tools made of the embedded models: read, inspected and checked, and their perplexity is what
their own tool measures. QUANTKIT_LLMCOMPRESSOR_PYTHON and QUANTKIT_GPTQMODEL_PYTHON name interpreters with
llm-compressor and GPTQModel; without one its tests are skipped. `pytest -m slow -s tests/e2e/test_others.py` prints the
tables of docs/evaluation.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantkit.calibration.dataset import load_tokenizer, text_rows
from quantkit.conformance import check_folder
from quantkit.evaluate import compare, open_source
from quantkit.inspection import inspect_folder
from quantkit.scoring import open_scorer

from .jobs import EXAMPLES

LLMCOMPRESSOR, GPTQMODEL = (os.environ.get(f"QUANTKIT_{n}_PYTHON", "") for n in ("LLMCOMPRESSOR", "GPTQMODEL"))
pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
WINDOWS, LENGTH = 16, 128
TOKENS = WINDOWS * (LENGTH - 1)
# Of the logarithm of the perplexity: fp32 sums of at most 768 terms, through 29 Linears in a row, whose errors add up
# like a walk; over all tokens they average out.
FP32 = 29 * 768**0.5 * 2**-24 / TOKENS**0.5

Recipe = list[tuple[str, dict[str, Any]]]
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def plain(**arguments: Any) -> Recipe:
    return [("QuantizationModifier", {"targets": "Linear", **arguments})]


def groups(**targets: dict[str, Any]) -> Recipe:
    return [("QuantizationModifier", {"config_groups": targets})]


PER_CHANNEL, PER_TOKEN = INT8 | {"strategy": "channel"}, INT8 | {"strategy": "token", "dynamic": True}
PER_TENSOR = INT8 | {"strategy": "tensor", "symmetric": False, "dynamic": False}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
RECIPES: dict[str, Recipe] = {
    **{
        scheme: plain(scheme=scheme)
        for scheme in (
            "W4A16",
            "W4A16_ASYM",
            "W8A16",
            "W8A8",
            "W4A8",
            "W4A4",
            "W4AFP8",
            "FP8",
            "FP8_DYNAMIC",
            "FP8_BLOCK",
            "MXFP8",
            "MXFP4",
            "MXFP4A16",
            "NVFP4",
            "NVFP4A16",
        )
    },
    "FP8, FP8 cache": plain(scheme="FP8", kv_cache_scheme=FP8_CACHE),
    "FP8_DYNAMIC, cache per head": plain(scheme="FP8_DYNAMIC", kv_cache_scheme=FP8_CACHE | {"strategy": "attn_head"}),
    "FP8 cache alone": [("QuantizationModifier", {"kv_cache_scheme": FP8_CACHE})],
    "W8A8, static asymmetric inputs": groups(
        group_0={"targets": ["Linear"], "weights": PER_CHANNEL, "input_activations": PER_TENSOR}
    ),
    "attention W8A8, mlp W4A16": groups(
        group_0={"targets": ["re:.*self_attn.*"], "weights": PER_CHANNEL, "input_activations": PER_TOKEN},
        group_1={"targets": ["re:.*mlp.*proj$"], "weights": INT4},
    ),
    "GPTQ W4A16": [("GPTQModifier", {"targets": "Linear", "scheme": "W4A16"})],
    "GPTQ W4A16, actorder weight": [("GPTQModifier", {"targets": "Linear", "scheme": "W4A16", "actorder": "weight"})],
    "SmoothQuant, GPTQ W8A8": [
        ("SmoothQuantModifier", {"smoothing_strength": 0.8}),
        ("GPTQModifier", {"targets": "Linear", "scheme": "W8A8"}),
    ],
    "AWQ W4A16_ASYM": [("AWQModifier", {}), *plain(scheme="W4A16_ASYM")],
}
OF_EXPERTS = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "GPTQ W4A16")
WEIGHTS_ALONE = tuple(name for name in RECIPES if "A16" in name and "W8A8" not in name)
# What GPTQModel is told. Version 2 is what it has for asymmetric codes.
GPTQ = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True, "format": "gptq", "quant_method": "gptq"}
AWQ = GPTQ | {"format": "gemm", "quant_method": "awq"}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq, desc_act": GPTQ | {"desc_act": True},
    "gptq, asymmetric": GPTQ | {"sym": False},
    "gptq, int8": GPTQ | {"bits": 8},
    "gptq, channels": GPTQ | {"group_size": -1, "act_group_aware": False},
    "gptq, some layers": GPTQ | {"dynamic": {r"-:.*layers\.2\..*": {}}},
    "gptq, int8 in some layers": GPTQ | {"dynamic": {r"-:.*layers\.2\..*": {}, "+:.*down_proj.*": {"bits": 8}}},
    "gptq_v2": GPTQ | {"format": "gptq_v2"},
    "gptq_v2, asymmetric": GPTQ | {"format": "gptq_v2", "sym": False},
    "gptq_v2, asymmetric, desc_act": GPTQ | {"format": "gptq_v2", "sym": False, "desc_act": True},
    "awq": AWQ | {"sym": False},
    "awq, symmetric": AWQ,
}

llmc = pytest.mark.skipif(
    not LLMCOMPRESSOR, reason="QUANTKIT_LLMCOMPRESSOR_PYTHON does not name an interpreter with llm-compressor"
)
gptqmodel = pytest.mark.skipif(
    not GPTQMODEL, reason="QUANTKIT_GPTQMODEL_PYTHON does not name an interpreter with GPTQModel"
)
Made = Callable[[str, str, str], dict[str, Any]]


def ids(model: str) -> tuple[list[list[int]], list[list[int]]]:
    """Rows to calibrate with, and to measure."""
    tokenizer = load_tokenizer(EXAMPLES / "models" / model)
    lines = (EXAMPLES / "data" / "calibration.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:16]]
    measured = text_rows(EXAMPLES / "data" / "evaluation.txt", tokenizer, LENGTH, WINDOWS)
    return [tokenizer.encode(text)[:256] for text in texts], measured


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(tool, model, recipe) -> what the tool told of it; all recipes of a model that are tested are made at once."""
    done: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {params["recipe"] for params in cases if isinstance(params.get("recipe"), str)}

    def get(tool: str, model: str, recipe: str) -> dict[str, Any]:
        if (tool, model) not in done:
            done[tool, model] = run(tool, model, asked, tmp_path_factory.mktemp(tool))
        return done[tool, model][recipe]

    return get


def run(tool: str, model: str, asked: set[str], folder: Path) -> dict[str, dict[str, Any]]:
    ignore = ["lm_head", "re:.*mlp.gate$"]
    recipes: dict[str, Any] = {name: recipe for name, recipe in CONFIGS.items() if name in asked}
    if tool == "llmcompressor":
        recipes = {
            name: [
                (kind, arguments if kind.startswith(("Smooth", "AWQ")) else {"ignore": ignore} | arguments)
                for kind, arguments in recipe
            ]
            for name, recipe in RECIPES.items()
            if name in asked and (model == "tiny-llama" or name in OF_EXPERTS)
        }
    calibration, evaluation = ids(model)
    job = folder / "job.json"
    job.write_text(
        json.dumps(
            {
                "model": str(EXAMPLES / "models" / model),
                "output": str(folder),
                "calibration": calibration,
                "evaluation": evaluation,
                "recipes": recipes,
            }
        )
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # GPTQModel's loader wants two workers, and takes half of the cores unless told.
    environment |= {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    command = [LLMCOMPRESSOR if tool == "llmcompressor" else GPTQMODEL, str(HERE / f"peer_{tool}.py"), str(job)]
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    # Progress bars stand in front of some.
    told = [json.loads(t.partition("RESULT ")[2]) for t in finished.stdout.splitlines() if "RESULT {" in t]
    assert len(told) == len(recipes), finished.stderr[-3000:]
    return {t["name"]: t for t in told}


def of_noise(kl: float) -> float:
    """By how much two draws of a noise of `kl` nats of KL divergence per token may change the logarithm of the
    perplexity: a token's log probability has 2 KL of variance in each. Four standard deviations.
    """
    return 4 * math.sqrt(4 * kl / TOKENS)


def perplexity(folder: Path, backend: str, rows: list[list[int]]) -> float:
    scorer = open_scorer(folder, backend, progress=False)
    scores = scorer.score([(row[:1], row[1:]) for row in rows])
    scorer.close()
    return math.exp(-sum(logprob for logprob, _ in scores) / TOKENS)


def of_activations(folder: Path, rows: list[list[int]]) -> float:
    """KL divergence that rounding inputs and caches alone makes, nats per token."""
    rounded, exact = open_source(folder), open_source(folder)
    plain = (lambda x: x, lambda x: x)
    exact.input_quantizers, exact.cache_quantizers = {}, dict.fromkeys(exact.cache_quantizers, plain)  # type: ignore
    kl: float = compare([folder, folder], [rounded, exact], rows, progress=False)["kl"]
    return kl


def of_bf16(name: str, rows: list[list[int]]) -> float:
    """KL divergence that computing the plain model in bf16 makes."""
    logs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLES / "models" / name, dtype=dtype)
        with torch.no_grad():
            logs.append(torch.log_softmax(model(torch.tensor(rows)).logits[:, :-1].float(), -1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def check(told: dict[str, Any], model: str, rounded: bool) -> None:
    """The checkpoint is read and its perplexity is what the other tool says. All is computed in fp32 unless the tool
    cannot; what is between the two then is the order of sums. `rounded`: activations or caches are.
    """
    assert "error" not in told, told["error"]
    folder, (_, rows) = Path(told["folder"]), ids(model)
    assert inspect_folder(folder, progress=False).render()
    # The order of sums moves an activation to the code next to it here and there, in one layer, and then in all that
    # follow: after a few layers two implementations are two draws of the rounding's noise. Weights alone draw nothing.
    noise = of_activations(folder, rows) if rounded else 0.0
    noise += of_bf16(model, rows) if "bfloat16" in told.get("measured", "") else 0.0
    bound = FP32 + of_noise(noise)
    shown = []
    for backend in ("dequantized", "quantkit"):
        ours = perplexity(folder, backend, rows)
        shown.append(f"{ours:.5f}")
        assert abs(math.log(ours / told["perplexity"])) < bound, (told["name"], backend, ours, told, bound)
    if "kernel_perplexity" in told:
        wide = bound + of_noise(of_bf16(model, rows))
        assert abs(math.log(told["kernel_perplexity"] / told["perplexity"])) < wide, (told, wide)
    how = told.get("measured", "float32")
    print(f"\n| {told['name']} | {told['perplexity']:.5f} ({how}) | {' | '.join(shown)} | {bound:.1e} |")


@llmc
@pytest.mark.parametrize("recipe", RECIPES)
def test_llm_compressors_dense_models(recipe: str, made: Made) -> None:
    told = made("llmcompressor", "tiny-llama", recipe)
    check(told, "tiny-llama", recipe not in WEIGHTS_ALONE)
    verdict = check_folder(told["folder"], "transformers")
    assert verdict.ok, verdict.render()


@llmc
@pytest.mark.parametrize("recipe", OF_EXPERTS)
def test_llm_compressors_experts(recipe: str, made: Made) -> None:
    check(made("llmcompressor", "tiny-moe", recipe), "tiny-moe", recipe not in WEIGHTS_ALONE)


@gptqmodel
@pytest.mark.parametrize("recipe", CONFIGS)
def test_gptqmodels_formats(recipe: str, made: Made) -> None:
    told = made("gptqmodel", "tiny-llama", recipe)
    check(told, "tiny-llama", rounded=False)
    verdict = check_folder(told["folder"], "gptqmodel", hardware="cpu")
    assert verdict.ok, verdict.render()
