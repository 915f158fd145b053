"""Runs in llm-compressor's Python: quantizes a model by many recipes and measures each result with its own tools.

usage: peer_llmcompressor.py JOB.json
JOB: {model, output, calibration: rows of ids, evaluation: rows, recipes: {name: [[modifier, arguments], ...]}}
Prints a line for each recipe: RESULT and JSON, {name, folder, perplexity, measured: how} or {name, error}.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import compress_module, decompress_module
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {m.__name__: m for m in (AWQModifier, GPTQModifier, QuantizationModifier, SmoothQuantModifier)}


def perplexity(model: Any, rows: list[list[int]]) -> float:
    """Of each row's tokens after its first."""
    loss = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            logs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
            loss -= float(logs.gather(1, ids[0, 1:, None]).double().sum())
    return math.exp(loss / sum(len(row) - 1 for row in rows))


def measured(folder: Path, remade: Callable[[], Any], rows: list[list[int]]) -> dict[str, Any]:
    """The perplexity of what Transformers with compressed-tensors makes of the folder: in fp32, else in bf16, which is
    all that it dequantizes MX and NVFP4 to. Experts, which Transformers reads in part and rounds to bf16, are measured
    as they were before they were saved, compressed and decompressed with scales in fp32.
    """
    experts = "moe" in json.loads((folder / "config.json").read_text())["model_type"]
    for dtype in () if experts else (torch.float32, torch.bfloat16):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            return {"perplexity": perplexity(model, rows), "measured": str(dtype).removeprefix("torch.")}
        except RuntimeError as error:
            print(f"{folder.name} in {dtype}: {type(error).__name__}: {error}", file=sys.stderr)
    if not experts:
        raise RuntimeError("it does not load what it wrote")
    model = remade()
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            compress_module(module)
            module.weight_scale.data = module.weight_scale.data.float()
            decompress_module(module)
    return {"perplexity": perplexity(model.float().eval(), rows), "measured": "float32, in memory"}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(2)
    # Its AWQ pins memory even where there is no GPU, which fails.
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    rows = job["calibration"]
    data = Dataset.from_list([{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows])

    def quantized(recipe: list[Any]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
        oneshot(
            model=model,
            dataset=data,
            recipe=[MODIFIERS[kind](**arguments) for kind, arguments in recipe],
            max_seq_length=max(map(len, rows)),
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
        return model

    for name, recipe in job["recipes"].items():
        told: dict[str, Any] = {"name": name}
        try:
            model = quantized(recipe)
            folder = Path(job["output"]) / name.replace(" ", "_")
            model.save_pretrained(folder, save_compressed=True)
            AutoTokenizer.from_pretrained(job["model"]).save_pretrained(folder)
            told["folder"] = str(folder)
            told |= measured(folder, lambda recipe=recipe: quantized(recipe), job["evaluation"])
        except Exception as error:  # a scheme that it cannot make here is for the reader to see
            told["error"] = f"{type(error).__name__}: {error}"[:600]
        print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
