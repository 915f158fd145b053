"""Hours, memory and disk for models that are not here: `quantkit plan`'s estimate on the shapes written down below.

usage: python benchmarks/scale_table.py [--samples 256] [--length 2048] [--budget 22GB] [--cores 64]

Nothing is downloaded and nothing is run. The CPU's rates are measured (benchmarks/rates.py), the GPUs' are assumptions
(`estimate_time.H100`); memory and disk are what the plan says of this shape, on disk the output and, within the budget,
hidden states.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from recipes import IGNORE, RECIPES

from quantkit import estimate
from quantkit.calibrate import expected_bytes
from quantkit.checkpoint.dtypes import byte_size
from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.recipe_file import recipe_of
from quantkit.config.run_config import (
    GATHERED,
    CalibrationConfig,
    CompressionConfig,
    DatasetConfig,
    GlobalConfig,
    ModelConfig,
    RunConfig,
)
from quantkit.estimate_time import CPU, H100, seconds, spell, total, work_of
from quantkit.models.families import family_of
from quantkit.plan import Plan, build_plan
from quantkit.report.table import size

# Of no machine in particular.
estimate.memory_available = lambda: None

# The keys of their config.json that a plan looks at, from their model cards.
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "vocab_size": 151936,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
}
MODELS = {
    "Qwen3-235B-A22B": QWEN3,
    "DeepSeek-R1 (read as bf16)": DEEPSEEK,
    "1.6 TB: as R1, 308 experts": {**DEEPSEEK, "n_routed_experts": 308},
}
JOBS = {
    "GPTQ W4A16": RECIPES["gptq"],
    "AWQ W4A16": RECIPES["awq"],
    "FP8 static": RECIPES["fp8"],
    "FP8 dynamic (no data)": {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", **IGNORE}},
}


@dataclass(frozen=True)
class Info:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Paper:
    """A checkpoint in bf16 of which only the shapes exist."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.folder, self.config = Path(name), config
        linears = _deepseek(config) if config["model_type"] == "deepseek_v3" else _qwen(config)
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        ends = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
        self.tensors = {
            f"{module}.weight": Info("BF16", shape, byte_size("BF16", shape))
            for module, shape in {**dict(linears), **ends}.items()
        }
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self.side_files: list[Path] = []
        self.parts = self.tensors
        self.dequantized = self.remade = self.gathered = frozenset[str]()


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _mlp(path: str, hidden: int, inner: int) -> Shapes:
    yield f"{path}.gate_proj", (inner, hidden)
    yield f"{path}.up_proj", (inner, hidden)
    yield f"{path}.down_proj", (hidden, inner)


def _norms(path: str, hidden: int) -> Shapes:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{path}.{norm}", (hidden,)


def _qwen(c: dict[str, Any]) -> Shapes:
    hidden, queries, keys = c["hidden_size"], c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"]
    for i in range(c["num_hidden_layers"]):
        path = f"model.layers.{i}"
        yield from _norms(path, hidden)
        yield f"{path}.self_attn.q_proj", (queries, hidden)
        yield f"{path}.self_attn.k_proj", (keys * c["head_dim"], hidden)
        yield f"{path}.self_attn.v_proj", (keys * c["head_dim"], hidden)
        yield f"{path}.self_attn.o_proj", (hidden, queries)
        yield f"{path}.mlp.gate", (c["num_experts"], hidden)
        for e in range(c["num_experts"]):
            yield from _mlp(f"{path}.mlp.experts.{e}", hidden, c["moe_intermediate_size"])


def _deepseek(c: dict[str, Any]) -> Shapes:
    hidden, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    for i in range(c["num_hidden_layers"]):
        path = f"model.layers.{i}"
        yield from _norms(path, hidden)
        yield f"{path}.self_attn.q_a_proj", (c["q_lora_rank"], hidden)
        yield f"{path}.self_attn.q_b_proj", (heads * (c["qk_nope_head_dim"] + rope), c["q_lora_rank"])
        yield f"{path}.self_attn.kv_a_proj_with_mqa", (c["kv_lora_rank"] + rope, hidden)
        yield f"{path}.self_attn.kv_b_proj", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        yield f"{path}.self_attn.o_proj", (hidden, heads * c["v_head_dim"])
        yield f"{path}.self_attn.q_a_layernorm", (c["q_lora_rank"],)
        yield f"{path}.self_attn.kv_a_layernorm", (c["kv_lora_rank"],)
        if i < c["first_k_dense_replace"]:
            yield from _mlp(f"{path}.mlp", hidden, c["intermediate_size"])
            continue
        yield f"{path}.mlp.gate", (c["n_routed_experts"], hidden)
        yield from _mlp(f"{path}.mlp.shared_experts", hidden, c["moe_intermediate_size"])
        for e in range(c["n_routed_experts"]):
            yield from _mlp(f"{path}.mlp.experts.{e}", hidden, c["moe_intermediate_size"])


def planned(paper: Paper, recipe: dict[str, Any], args: argparse.Namespace, budget: str | None) -> Plan:
    config = RunConfig(
        GlobalConfig(save_path="paper", memory_budget=budget),
        ModelConfig(str(paper.folder)),
        CompressionConfig(recipe=recipe_of(recipe)),
        DatasetConfig(data_path="rows", max_seq_length=args.length, num_samples=args.samples),
        source=paper.folder,
        stem="out",
        calibration=CalibrationConfig() if budget is None else CalibrationConfig(offload="disk"),
    )
    return build_plan(config, cast(Checkpoint, paper))


def rows_of(name: str, config: dict[str, Any], title: str, args: argparse.Namespace) -> list[str]:
    """A line of the table."""
    paper = Paper(name, config)
    plan, tight = (planned(paper, JOBS[title], args, budget) for budget in (None, args.budget))
    work = work_of(plan)
    here = total(seconds(work, CPU, cores=args.cores))
    hours = [spell(here), *(spell(total(seconds(work, H100, devices=n))) for n in (1, 8))]
    scratch = tight.estimate.choice.scratch if tight.estimate.choice is not None else 0
    memory = [size(p.estimate.memory_bytes) for p in (plan, tight)]
    budget = tight.config.global_.memory_budget_bytes
    if tight.recipe.needs_data and budget is not None and tight.estimate.memory_bytes > budget:
        memory[1], scratch = f"refused: {memory[1]} at least", 0
    disk = size(plan.estimate.output_bytes) + (f" + {size(scratch)}" if scratch else "")
    return [name, title, size(paper.total_bytes), *hours, *memory, disk]


def heads(args: argparse.Namespace) -> list[str]:
    cpu = f"{args.cores} cores"
    return ["model", "job", "source", cpu, "1 H100", "8 H100", "memory", f"within {args.budget}", "disk"]


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--budget", default="22GB")
    parser.add_argument("--cores", type=int, default=64)
    return parser.parse_args(argv)


def markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    args = options()
    print(f"{args.samples} rows of {args.length} tokens")
    print(markdown(heads(args)))
    print("|" + "---|" * len(heads(args)))
    for name, config in MODELS.items():
        for title in JOBS:
            print(markdown(rows_of(name, config, title, args)), flush=True)
    print("\n| model | statistics of `quantkit calibrate` | without Gram matrices |\n|---|---|---|")
    for name, config in MODELS.items():
        paper = Paper(name, config)
        shapes, family = {n: info.shape for n, info in paper.tensors.items()}, family_of(config)
        linears = [linear.module for linear in family.linear_weights(shapes) if not linear.head]
        saved = [size(expected_bytes(family, linears, shapes, kinds)) for kinds in (GATHERED, ("histogram",))]
        print(markdown([name, *saved]), flush=True)


if __name__ == "__main__":
    main()
