"""llm-compressor's FP8 (static) on a checkpoint: run by `fp8_static.py` with the interpreter that has it.

usage: peer_fp8_static.py MODEL OUTPUT ROWS.json     prints one JSON line: seconds of oneshot, peak RSS in MB
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

model_path, output, rows_file = sys.argv[1:]
rows = json.loads(Path(rows_file).read_text())
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
data = Dataset.from_list([{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows])
started = time.perf_counter()
oneshot(
    model=model,
    dataset=data,
    recipe=[QuantizationModifier(targets="Linear", scheme="FP8", ignore=["lm_head"])],
    max_seq_length=len(rows[0]),
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
