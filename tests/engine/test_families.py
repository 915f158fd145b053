"""Families: which tensors are Linears, by name and shape alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import CheckpointError
from quantkit.models.families import FAMILIES, Family, family_of

from .tiny import CONFIGS, FileSource, make


def linears(family: Family, tensors: dict[str, tuple[int, ...]]) -> set[str]:
    return {linear.module for linear in family.linear_weights(tensors)}


LLAMA = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.mlp.gate_proj.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (32, 8),
}


def test_llama_linears_and_fused_sets() -> None:
    family = family_of({"model_type": "llama", "num_hidden_layers": 1})
    found = family.linear_weights(LLAMA)
    assert [linear.module for linear in found] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "lm_head",
    ]
    assert [linear.head for linear in found] == [False] * 5 + [True]
    assert (found[1].rows, found[1].cols) == (4, 8)
    attention = "model.layers.0.self_attn"
    assert family.fused_sets(linear.module for linear in found) == [
        (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    ]


def test_a_set_of_one_is_no_set() -> None:
    family = family_of({"model_type": "llama", "num_hidden_layers": 1})
    assert family.fused_sets(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]) == []


def test_routers_gates_and_correction_bias_are_never_linears() -> None:
    prefix = "model.layers.0.mlp"
    tensors = {
        f"{prefix}.gate.weight": (4, 8),
        f"{prefix}.gate.e_score_correction_bias": (4,),
        f"{prefix}.shared_expert_gate.weight": (1, 8),
        f"{prefix}.experts.0.gate_proj.weight": (16, 8),
        f"{prefix}.shared_expert.gate_proj.weight": (16, 8),
        "model.layers.0.block_sparse_moe.gate.weight": (4, 8),
        "model.layers.0.feed_forward.router.weight": (4, 8),
    }
    family = family_of({"model_type": "qwen2_moe", "num_hidden_layers": 1})
    assert linears(family, tensors) == {f"{prefix}.experts.0.gate_proj", f"{prefix}.shared_expert.gate_proj"}
    assert [linear.expert for linear in family.linear_weights(tensors)] == [True, False]


def test_prediction_layers_behind_the_last_one_are_left_alone() -> None:
    family = family_of({"model_type": "deepseek_v3", "num_hidden_layers": 61})
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in (60, 61)]
    assert linears(family, dict.fromkeys(names, (8, 8))) == {"model.layers.60.self_attn.o_proj"}


def test_vision_towers_and_the_nested_text_config() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2}}
    family = family_of(config)
    tensors = {
        "language_model.model.layers.0.mlp.up_proj.weight": (16, 8),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (16, 8),
        "multi_modal_projector.linear.weight": (8, 8),
        "language_model.lm_head.weight": (32, 8),
    }
    assert linears(family, tensors) == {"language_model.model.layers.0.mlp.up_proj", "language_model.lm_head"}
    assert family.root(tensors) == "language_model.model."
    assert family.tied


def test_mla_projections_share_their_input() -> None:
    family = family_of({"model_type": "deepseek_v3", "num_hidden_layers": 1})
    names = [f"model.layers.0.self_attn.{p}" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")]
    assert family.fused_sets(names) == [(names[0], names[2])]


def test_fused_experts_are_named_and_are_no_linears() -> None:
    family = family_of({"model_type": "qwen3_moe", "num_hidden_layers": 1})
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": (4, 32, 8)}
    assert family.fused_experts(tensors) == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert linears(family, tensors) == set()


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_family_agrees_with_the_modules_of_transformers(model_type: str, tmp_path: Path) -> None:
    """What the headers say is a Linear is one in Transformers, or an expert's share of a fused parameter."""
    import torch

    model = make(tmp_path, model_type)
    config = json.loads((tmp_path / "config.json").read_text())
    assert family_of(config).known
    family = family_of(config)
    shapes = {name: tuple(t.shape) for name, t in FileSource(tmp_path).tensors.items()}
    found = {linear.module for linear in family.linear_weights(shapes) if not linear.expert}
    if family.tied:
        assert "lm_head" not in found
    modules = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # Routers, the gate in front of a shared expert and parts of indexers are Linears that must stay as they are.
    kept = ("shared_expert_gate", ".router", ".gate.wg", ".indexer.wk", ".indexer.weights_proj")
    expected = {name for name in modules if not name.endswith(kept)} - ({"lm_head"} if family.tied else set())
    for here, there in family.renames:
        expected = {name.replace(here, there) for name in expected}
    assert found == expected
    parameters = [(n, p) for n, p in model.named_parameters() if ".experts." in n]
    experts = sum(p.shape[0] * (2 if "gate_up" in n else 1) for n, p in parameters if p.dim() == 3)
    assert sum(linear.expert for linear in family.linear_weights(shapes)) == experts


def test_unknown_architectures_are_taken_for_llama_shaped() -> None:
    config = {"model_type": "something_new", "num_hidden_layers": 1}
    assert not family_of(config).known
    assert not family_of(config).known
    assert linears(family_of(config), dict(LLAMA)) == linears(
        family_of({"model_type": "llama", "num_hidden_layers": 1}), dict(LLAMA)
    )


@pytest.mark.parametrize("layers", [None, 0, -1, True, "4", 2.0])
def test_a_config_without_layers_is_refused(layers: object) -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        family_of({"model_type": "llama", "num_hidden_layers": layers})


def test_a_checkpoint_of_other_names_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.0"):
        family_of({"model_type": "llama", "num_hidden_layers": 1}).root(["transformer.h.0.attn.weight"])


def test_rows_of_the_table_are_fields() -> None:
    for model_type, row in FAMILIES.items():
        Family(model_type, **row)


def test_importing_families_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, quantkit.models.families; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_towers_are_named_in_every_way_that_clients_name_them() -> None:
    """Transformers calls `vision_tower.` of a checkpoint `model.vision_tower.`, and layers `model.language_model.`."""
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2}}
    kept = ["vision_tower.encoder.layers.1.mlp.fc1", "language_model.model.layers.1.mlp.up_proj", "lm_head"]
    patterns = [re.compile(p.removeprefix("re:")) for p in family_of(config).elsewhere(kept)]
    assert len(patterns) == 2

    def matched(name: str) -> bool:
        return any(pattern.match(name) for pattern in patterns)

    for prefix in ("", "model."):
        assert matched(f"{prefix}vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")
    for prefix in ("language_model.model", "model.language_model", "model"):
        assert matched(f"{prefix}.layers.1.mlp.up_proj")
        assert not matched(f"{prefix}.layers.0.mlp.up_proj") and not matched(f"{prefix}.layers.11.mlp.up_proj")
    assert not matched("lm_head") and family_of({"model_type": "llama", "num_hidden_layers": 2}).elsewhere(kept) == []


def test_the_docs_list_every_family() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
    listed = [name for row in page.splitlines() if row.startswith("| ") for name in re.findall(r"`(\w+)`", row)]
    assert sorted(set(listed) - {"model_type", "text_config"}) == sorted(FAMILIES)
    assert f"For {len(CONFIGS)} of them" in page
