"""llama.cpp's converter on checkpoints: each to a GGUF in fp32, read again by its gguf-py and written as safetensors.

usage: peer_llama_cpp.py LLAMA_CPP JOBS.json        LLAMA_CPP: the folder with convert_hf_to_gguf.py and gguf-py
JOBS: {folder of a checkpoint: safetensors file to write}
Prints a line for each: RESULT and JSON, {folder, types: of the GGUF's quantized tensors} or {folder, error}.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SOURCE = Path(sys.argv[1])
sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]

import gguf  # noqa: E402
from conversion import get_model_class  # noqa: E402


def convert(folder: Path, to: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    model: Any = get_model_class(config["architectures"][0])
    # No vocabulary, and rows where Transformers has them: neither is what is compared.
    model.set_vocab, model.undo_permute = lambda self: None, False
    with torch.inference_mode():
        model(folder, gguf.LlamaFileType.ALL_F32, to).write()


def decoded(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every tensor by gguf-py's own dequantization; a scale that NVFP4 keeps apart is multiplied in."""
    tensors, types = {}, set()
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.copy()).float()
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            types.add(tensor.tensor_type.name)
    for name in [n for n in tensors if n.endswith(".scale")]:
        weight, scale = f"{name.removesuffix('scale')}weight", tensors.pop(name)
        tensors[weight] *= scale.reshape(-1, *[1] * (tensors[weight].ndim - 1)) if scale.numel() > 1 else scale
    return tensors, sorted(types)


def main() -> None:
    for folder, to in json.loads(Path(sys.argv[2]).read_text()).items():
        told: dict[str, Any] = {"folder": folder}
        try:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "model.gguf"
                convert(Path(folder), path)
                tensors, told["types"] = decoded(path)
            save_file(tensors, to)
        except Exception as error:  # what it refuses is for the reader to see
            told["error"] = f"{type(error).__name__}: {error}"[:600]
        print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
