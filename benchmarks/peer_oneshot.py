"""llm-compressor on a checkpoint: run by `calibrated.py` and `accuracy.py` with the interpreter that has it.

usage: peer_oneshot.py MODEL OUTPUT ROWS.json RECIPE      RECIPE: JSON, {modifier: arguments}
Prints one JSON line: seconds of oneshot, seconds of saving, peak RSS in MB.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM

MODIFIERS = {m.__name__: m for m in (AWQModifier, GPTQModifier, QuantizationModifier, SmoothQuantModifier)}

model_path, output, rows_file, recipe = sys.argv[1:]
rows = json.loads(Path(rows_file).read_text())
torch.set_num_threads(2)
# Its AWQ pins memory even where there is no GPU, which fails.
torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
data = Dataset.from_list([{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows])
modifiers = [MODIFIERS[name](**arguments) for name, arguments in json.loads(recipe).items()]
started = time.perf_counter()
oneshot(
    model=model,
    dataset=data,
    recipe=modifiers,
    max_seq_length=max(map(len, rows)),
    num_calibration_samples=len(rows),
    shuffle_calibration_samples=False,
)
quantize = time.perf_counter() - started
started = time.perf_counter()
model.save_pretrained(output, save_compressed=True)
print(
    json.dumps(
        {
            "quantize_s": round(quantize, 2),
            "save_s": round(time.perf_counter() - started, 2),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    )
)
