"""The peers of benchmarks/generate.py, each run by an interpreter that has it; nothing here needs quantkit.

A server reads lines [prompt tokens, new tokens] and answers each by TIMES [seconds of the prompt, seconds of the rest].
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[list[int], int], tuple[float, float]]


def answer(run: Run, vocab: int) -> None:
    """Serve requests from standard input."""
    for line in sys.stdin:
        prompt, tokens = json.loads(line)
        ids = random.Random(0).choices(range(3, vocab), k=prompt)
        print("TIMES " + json.dumps(run(ids, tokens)), flush=True)


def vllm(scheme: str, folder: Path, threads: int) -> Run:
    """vLLM on the folder that quantkit wrote: a request of one token is the prompt's time."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
    from vllm import LLM, SamplingParams

    model = folder / "llama-1b" if scheme == "bf16" else folder / scheme / scheme
    llm = LLM(str(model), dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False, seed=0)

    def seconds(ids: list[int], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        return time.perf_counter() - started

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        first = seconds(ids, 1)
        return first, seconds(ids, tokens + 1) - first

    return run


def llama(kind: str, folder: Path, threads: int) -> Run:
    """llama.cpp on its own quantized file."""
    import numpy
    from llama_cpp import Llama

    llm = Llama(
        str(folder / f"{kind}.gguf"), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def best() -> int:
        return int(numpy.argmax(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()]))

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        llm.reset()
        llm._ctx.kv_cache_clear()
        started = time.perf_counter()
        llm.eval(ids)
        token = best()
        first = time.perf_counter()
        for _ in range(tokens):
            llm.eval([token])
            token = best()
        return first - started, time.perf_counter() - first

    return run


def write_gguf(source: Path, folder: Path) -> None:
    """The bf16 checkpoint as GGUF, then quantized by llama.cpp itself to Q4_0 and Q8_0."""
    import gguf
    import llama_cpp
    import numpy

    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    plain = folder / "BF16.gguf"
    writer = gguf.GGUFWriter(str(plain), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for path in sorted(source.glob("*.safetensors")):
        raw = numpy.memmap(path, numpy.uint8)
        size = int(raw[:8].view(numpy.uint64)[0])
        header = json.loads(bytes(raw[8 : 8 + size]))
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + offset for offset in info["data_offsets"])
            words = numpy.array(raw[begin:end]).view(numpy.uint16).reshape(info["shape"])
            parts = name.removesuffix(".weight").split(".")
            if parts[1] == "layers":
                target = f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.weight"
                count = {"q_proj": heads, "k_proj": kv_heads}.get(parts[-1])
                if count:  # rotary pairs are neighbours there
                    words = words.reshape(count, 2, -1, words.shape[1]).swapaxes(1, 2).reshape(words.shape)
            else:
                target = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
            if words.ndim == 1:
                writer.add_tensor(target, (words.astype(numpy.uint32) << 16).view(numpy.float32))
            else:
                bytes_ = numpy.ascontiguousarray(words).view(numpy.uint8)
                writer.add_tensor(target, bytes_, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for kind, number in (("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0), ("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = number, 2
        target = str(folder / f"{kind}.gguf").encode()
        status = llama_cpp.llama_model_quantize(str(plain).encode(), target, params)
        if status:
            raise SystemExit(f"llama_model_quantize: {status}")


if __name__ == "__main__":
    if sys.argv[1] == "--gguf":
        write_gguf(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run = {"vllm": vllm, "llama": llama}[sys.argv[2]](sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
        answer(run, 128256)
