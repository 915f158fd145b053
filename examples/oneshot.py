"""SmoothQuant and GPTQ to W8A8 with a model in memory, as scripts for llm-compressor do it.

Run from the root of the repository: `python examples/oneshot.py [MODEL [DATA]]`. Writes into `output/`.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import oneshot
from quantkit.modifiers import GPTQModifier, SmoothQuantModifier

HERE = Path(__file__).resolve().parent
MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "models" / "tiny-llama")
DATA = sys.argv[2] if len(sys.argv) > 2 else str(HERE / "data" / "calibration.jsonl")
SAVE_DIR = Path("output") / f"{Path(MODEL_ID).name}-W8A8-Dynamic-Per-Token"

model = AutoModelForCausalLM.from_pretrained(MODEL_ID, device_map="auto", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)

oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=DATA,
    recipe=[
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ],
    max_seq_length=256,
    num_calibration_samples=64,
)

prompt = tokenizer("The history of the city", return_tensors="pt", return_token_type_ids=False).to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32, do_sample=False, repetition_penalty=1.3)[0]))

model.save_pretrained(SAVE_DIR, save_compressed=True)
tokenizer.save_pretrained(SAVE_DIR)
print(f"written to {SAVE_DIR}: vllm serve {SAVE_DIR}")
