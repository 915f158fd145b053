"""Accuracy of every data-free and static scheme, measured by a client: Transformers loads the output in fp32.

usage: python benchmarks/accuracy.py MODEL --calibration FILE --text FILE [--schemes W4A16 W8A8 ...]

Perplexity, KL(full precision || quantized) per token and top-1 agreement on the first 100 windows of 256 tokens of
`--text`, no special tokens; static schemes calibrate on the first 64 rows of 256 tokens of `--calibration`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import engine
from quantkit.config.yaml_file import load_run_config

SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")


def log_probabilities(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.cat([model(input_ids=part).logits.log_softmax(-1) for part in windows.split(10)])


def figures(got: torch.Tensor, reference: torch.Tensor, windows: torch.Tensor) -> tuple[float, float, float]:
    loss = -got[:, :-1].gather(-1, windows[:, 1:, None]).mean()
    divergence = (reference.exp() * (reference - got)).sum(-1).mean()
    same = (got.argmax(-1) == reference.argmax(-1)).float().mean()
    return math.exp(loss), float(divergence), float(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(), add_special_tokens=False)["input_ids"][:25600]
    windows = torch.tensor(ids).reshape(100, 256)
    reference = log_probabilities(args.model, windows)
    print(f"{args.model.name}: torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'full precision':<16} ppl {figures(reference, reference, windows)[0]:8.4f}")
    with tempfile.TemporaryDirectory() as folder:
        for scheme in args.schemes:
            config = Path(folder) / f"{scheme}.yaml"
            config.write_text(
                f"global: {{save_path: {folder}}}\nmodel: {{model_path: {args.model}}}\n"
                f"compression: {{name: PTQ, quantization: {{scheme: {scheme}, ignore_layers: [lm_head]}}}}\n"
                f"dataset: {{data_path: {args.calibration}, max_seq_length: 256, num_samples: 64}}\n"
            )
            result = engine.run(load_run_config(config))
            try:
                got = log_probabilities(result.output, windows)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{scheme:<16} Transformers does not load it: {str(error).splitlines()[0][:90]}")
                continue
            ppl, kl, same = figures(got, reference, windows)
            seconds = sum(result.seconds.values())
            print(f"{scheme:<16} ppl {ppl:8.4f}  KL {kl:.5f}  top-1 {same:.4f}  quantize {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
