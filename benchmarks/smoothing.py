"""What SmoothQuant recovers when activations have outliers: KL over strength, for W8A8 dynamic and static.

usage: python benchmarks/smoothing.py --data DIR [--model tiny-llama] [--factor 50] [--channels 4]

In a copy of the model, some channels of every norm are scaled up by `--factor` and the weights that read them down: the
function stays the same, and per-token int8 activations lose nearly all their codes to those channels. DIR as for
accuracy.py. Each line is one recipe on the plain model and on the one with outliers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from accuracy import ours
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from quantkit.calibration.dataset import text_rows
from quantkit.evaluate import compare, open_source

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def with_outliers(model: Path, folder: Path, factor: float, channels: int) -> Path:
    """A copy in fp32 (scaling in bf16 by a power of two alone would be exact), the same function."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.rpartition(".weight")[0].rpartition(".")[2] in READERS]:
        prefix, norm = name.removesuffix(".weight").rsplit(".", 1)
        chosen = torch.randperm(tensors[name].numel(), generator=generator)[:channels]
        tensors[name][chosen] *= factor
        for reader in READERS[norm]:
            tensors[f"{prefix}.{reader}.weight"][:, chosen] /= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in model.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_text(path.read_text().replace('"bfloat16"', '"float32"'))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--factor", type=float, default=50.0)
    parser.add_argument("--channels", type=int, default=4)
    args = parser.parse_args()
    plain = args.data / "models" / args.model
    tokenizer = AutoTokenizer.from_pretrained(plain)
    rows = text_rows(args.data / "wiki_cal.txt", tokenizer, 256, 64)
    windows = text_rows(args.data / "wikitext2.test.tokens.txt", tokenizer, 256, 100)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loud = with_outliers(plain, folder / "loud", args.factor, args.channels)
        print(f"{args.model}, {args.channels} channels of every norm x {args.factor:g}; KL to full precision")
        print(f"{'strength':<10} {'W8A8':>10} {'static':>10} {'outliers: W8A8':>16} {'static':>10}")
        for strength in (None, 0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0):
            found = []
            for model in (plain, loud):
                for scheme in ("W8A8", "W8A8_STATIC"):
                    recipe = {} if strength is None else {"SmoothQuantModifier": {"smoothing_strength": strength}}
                    recipe["QuantizationModifier"] = {"scheme": scheme, "ignore": ["lm_head"]}
                    output = ours(model, recipe, rows, folder)
                    sources = [open_source(output), open_source(model)]
                    found.append(compare([model, model], sources, windows, progress=False)["kl"])
            name = "none" if strength is None else f"{strength:g}"
            print(f"{name:<10} {found[0]:10.5f} {found[1]:10.5f} {found[2]:16.5f} {found[3]:10.5f}", flush=True)


if __name__ == "__main__":
    main()
