"""The main job on the embedded model: quantize by YAML, audit, load with Transformers, compare.

Run by `make demo`. Takes the YAML file as an optional argument; writes into `output/` under the current folder.
"""

import math
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "models" / "tiny-llama"
TEXT = HERE / "data" / "evaluation.txt"
PROMPT = "The history of the city"


def perplexity_and_line(folder: Path) -> tuple[float, str]:
    """Perplexity on the evaluation text (windows of 256 tokens) and a greedy continuation, both by Transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(TEXT.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = ids[: len(ids) // 256 * 256].reshape(-1, 256)
    with torch.inference_mode():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
        prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
        mask = torch.ones_like(prompt)
        line = model.generate(prompt, attention_mask=mask, max_new_tokens=32, do_sample=False, repetition_penalty=1.3)
    return math.exp(sum(losses) / len(losses)), tokenizer.decode(line[0]).replace("\n", " ")


def main() -> int:
    from quantkit.cli import main as quantkit

    started = time.perf_counter()
    config = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tiny_llama_int8_dynamic.yaml"
    output = Path("output") / config.stem
    status = quantkit(["run", "-c", str(config), "--model-path", str(SOURCE), "--overwrite"])
    if status:
        return status
    before, line_before = perplexity_and_line(SOURCE)
    after, line_after = perplexity_and_line(output)
    print(f"\nperplexity before {before:.3f}, after {after:.3f} ({after / before - 1:+.2%})")
    print(f"before: {line_before}\nafter:  {line_after}")
    print(f"finished in {time.perf_counter() - started:.0f} s; the model is in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
