"""Runs in vLLM's Python, which need not have quantkit: a line of JSON in, a line of JSON out.

The first line holds the arguments of vLLM's `LLM`; then {"score": [[context, continuation], ...]} and {"generate":
[[prompt, limit, stops], ...]}, all of token ids, until the input ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Any, TextIO

# What vLLM for the CPU needs to start on a small machine; whoever sets these is not overruled.
CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
}


def prepare() -> TextIO:
    """The pipe for answers; what vLLM prints goes to standard error instead."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        on_cpu = bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        on_cpu = "cpu" in importlib.metadata.version("vllm")
    if on_cpu:
        for name, value in CPU.items():
            os.environ.setdefault(name, value)
    return pipe


def score(model: Any, pairs: list[list[list[int]]]) -> list[list[Any]]:
    """[log probability, greedy] of each pair: those of the prompt's last tokens."""
    from vllm import SamplingParams

    prompts: Any = [{"prompt_token_ids": context + rest} for context, rest in pairs]
    # One more than the token itself: the most probable one; a token's rank says whether they are the same.
    how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    results = []
    for (context, rest), output in zip(pairs, model.generate(prompts, how, use_tqdm=False), strict=True):
        found = [output.prompt_logprobs[len(context) + i][token] for i, token in enumerate(rest)]
        results.append([sum(f.logprob for f in found), all(f.rank == 1 for f in found)])
    return results


def generate(model: Any, prompts: list[Any]) -> list[str]:
    """Greedy texts."""
    from vllm import SamplingParams

    how = [SamplingParams(temperature=0, max_tokens=limit, stop=stops or None) for _, limit, stops in prompts]
    ids: Any = [{"prompt_token_ids": prompt} for prompt, _, _ in prompts]
    return [output.outputs[0].text for output in model.generate(ids, how, use_tqdm=False)]


def main() -> None:
    pipe = prepare()

    def answer(what: dict[str, Any]) -> None:
        pipe.write(json.dumps(what) + "\n")
        pipe.flush()

    try:
        import vllm

        settings = json.loads(sys.stdin.readline())
        model = vllm.LLM(enforce_eager=True, enable_prefix_caching=False, **settings)
        dtype = str(model.llm_engine.model_config.dtype).removeprefix("torch.")
        answer({"version": vllm.__version__, "dtype": dtype})
        for line in sys.stdin:
            question = json.loads(line)
            if "score" in question:
                answer({"scores": score(model, question["score"])})
            else:
                answer({"texts": generate(model, question["generate"])})
    except Exception as error:  # whatever vLLM raises is for the other side to tell
        answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
