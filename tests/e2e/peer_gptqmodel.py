"""Runs in GPTQModel's Python: quantizes a model in many ways and measures each result with what GPTQModel reads of it.

usage: peer_gptqmodel.py JOB.json
JOB: {model, output, calibration: rows of ids, evaluation: rows, recipes: {name: arguments of QuantizeConfig}}
Prints a line for each recipe: RESULT and JSON, {name, folder, perplexity, kernels: which, kernel_perplexity or
kernel_error} or {name, error}. `perplexity`: of the weights that GPTQModel decodes, in fp32; `kernel_perplexity`: of
the kernels that it chooses, in bf16.
"""

import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import PackableQuantLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def perplexity(model: Any, rows: list[list[int]]) -> float:
    """Of each row's tokens after its first."""
    loss = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            logs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
            loss -= float(logs.gather(1, ids[0, 1:, None]).double().sum())
    return math.exp(loss / sum(len(row) - 1 for row in rows))


def decoded(source: str, folder: Path) -> Any:
    """The model in fp32 with the weights that GPTQModel decodes from `folder`; its own kernels round them to 16 bit."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    plain = {name: tensor.float() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    model.load_state_dict(plain, strict=False)  # what is not quantized; scales and codes are left over
    packed = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    for name, module in packed.named_modules():
        if not hasattr(module, "qweight"):
            continue
        module.scales.data = module.scales.data.float()  # they are stored in fp16, so this is exact
        if isinstance(module, PackableQuantLinear):
            weight = PackableQuantLinear.dequantize_weight(module)
        else:
            group = module.group_size if module.group_size > 0 else module.in_features
            weight = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, group)
        assert weight.dtype == torch.float32
        model.get_submodule(name).weight.data = weight.t().contiguous()
    return model.eval()


def by_kernels(folder: Path, rows: list[list[int]]) -> dict[str, Any]:
    """The same of the kernels that it chooses, or why they fail."""
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.AUTO).model.eval()
    kernels = {type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}
    told = {"kernels": f"{', '.join(sorted(kernels))} in {str(model.dtype).removeprefix('torch.')}"}
    try:
        return told | {"kernel_perplexity": perplexity(model, rows)}
    except RuntimeError as error:  # a group size that the kernel it chose refuses
        return told | {"kernel_error": str(error)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["calibration"]]
    for name, recipe in job["recipes"].items():
        told: dict[str, Any] = {"name": name}
        try:
            model = GPTQModel.load(job["model"], QuantizeConfig(**recipe), device="cpu")
            model.quantize(rows, tokenizer=tokenizer)
            folder = Path(job["output"]) / name.replace(" ", "_")
            model.save(str(folder))
            tokenizer.save_pretrained(folder)
            told["folder"] = str(folder)
            told["perplexity"] = perplexity(decoded(job["model"], folder), job["evaluation"])
            told |= by_kernels(folder, job["evaluation"])
        except Exception as error:  # what it cannot make or read here is for the reader to see
            told["error"] = f"{type(error).__name__}: {error}"[:600]
            traceback.print_exc()
        print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
