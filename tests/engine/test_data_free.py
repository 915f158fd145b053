"""Weights in parts, on several threads, give the bytes of whole ones; memory is that of the parts; any architecture."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit import audit as audit_module
from quantkit import data_free, engine, rounding
from quantkit.checkpoint.layout import OutputTensor, plan_layout
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.config.yaml_file import load_run_config
from quantkit.errors import CheckpointError
from quantkit.formats import FORMATS
from quantkit.formats.rows import no_rows
from quantkit.parallel import each

from ..e2e.jobs import quantize_by
from .headers import write_headers

SHAPES = {
    "self_attn.q_proj": (300, 256),
    "self_attn.k_proj": (129, 256),
    "self_attn.v_proj": (128, 256),
    "mlp.up_proj": (1, 256),
    "mlp.down_proj": (257, 384),
}
SCHEMES = ["W8A8", "W8A8_ASYM", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W4A16_CHANNEL_ASYM", "W8A16_ASYM"]
RECIPES = {
    **{scheme: f"{{QuantizationModifier: {{scheme: {scheme}}}}}" for scheme in SCHEMES},
    "FP8 per tensor": "{QuantizationModifier: {config_groups: {group_0: "
    "{targets: [Linear], weights: {num_bits: 8, type: float, strategy: tensor, symmetric: true}, "
    "input_activations: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: true}}}}}",
    "int8 per tensor": "{QuantizationModifier: {config_groups: {group_0: "
    "{targets: [Linear], weights: {num_bits: 8, type: int, strategy: tensor, symmetric: true}, "
    "input_activations: {num_bits: 8, type: int, strategy: token, symmetric: true, dynamic: true}}}}}",
    "mse": "{QuantizationModifier: {config_groups: {group_0: {targets: [Linear], weights: "
    "{num_bits: 4, type: int, strategy: group, group_size: 32, symmetric: true, observer: mse}}}}}",
}

LARGE_BLOCKS = (
    "{QuantizationModifier: {config_groups: {group_0: {targets: [Linear], weights: "
    "{num_bits: 8, type: float, strategy: block, block_structure: [320, 576], symmetric: true}, "
    "input_activations: {num_bits: 8, type: float, strategy: group, group_size: 576, "
    "symmetric: true, dynamic: true}}}}}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model type that nobody knows."""
    folder = tmp_path_factory.mktemp("model") / "strange"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "strange", "num_hidden_layers": 2, "dtype": "bfloat16", "hidden_size": 256})
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for layer in range(2)
        for name, shape in SHAPES.items()
    }
    tensors["model.norm.weight"] = torch.ones(256, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = torch.randn(64, 256, generator=generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made(model: Path, recipe: str, folder: Path, *overrides: str) -> dict[str, bytes]:
    folder.mkdir()
    output = quantize_by(str(model), recipe, folder, *overrides)
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name != "quantkit_config.json"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_parts_give_the_bytes_of_whole_weights(
    recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_part = made(model, recipe, tmp_path / "one")
    monkeypatch.setattr(rounding, "PART", 1)  # 128 rows
    monkeypatch.setattr(audit_module, "PART", 100)
    monkeypatch.setattr(data_free, "AHEAD", 1)
    for threads in (1, 3):
        found = made(model, recipe, tmp_path / f"threads {threads}", f"global.num_threads={threads}")
        assert found == in_one_part
    monkeypatch.setattr(FORMATS["compressed-tensors"], "row_tensors", no_rows)
    assert made(model, recipe, tmp_path / "whole") == in_one_part


@pytest.mark.parametrize(("scheme", "save_name"), [("W8A8", "mindie"), ("FP8_BLOCK", "fp8")])
def test_other_formats_with_rows(
    scheme: str, save_name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"compression.save_name={save_name}"
    monkeypatch.setattr(rounding, "PART", 1)
    in_parts = made(model, RECIPES[scheme], tmp_path / "parts", name)
    monkeypatch.setattr(FORMATS[save_name], "row_tensors", no_rows)
    assert made(model, RECIPES[scheme], tmp_path / "whole", name) == in_parts


@pytest.mark.parametrize("recipe", ["W8A8", "FP8 per tensor", "mse"])
def test_a_value_that_is_not_finite_is_named_by_its_row_in_the_weight(
    recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: tensor.clone() for name, tensor in _loaded(model).items()}
    tensors["model.layers.1.self_attn.q_proj.weight"][270, 3] = float("nan")
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(rounding, "PART", 1)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj: NaN or Inf in row 270 of 300;"):
        made(folder, RECIPES[recipe], tmp_path / "output")
    assert torch.get_num_threads() > 0 and not [t for t in threading.enumerate() if t.name.startswith("quantkit-")]


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}


def test_the_audit_sees_a_wrong_code_in_a_later_part(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    output = quantize_by(str(model), RECIPES["W8A8"], folder)
    name = "model.layers.1.mlp.down_proj.weight"
    with Checkpoint(output) as checkpoint:
        begin = checkpoint.info(name).begin + 256 * 384 + 5  # row 256
    with open(output / "model.safetensors", "r+b") as file:
        file.seek(begin)
        code = file.read(1)[0]
        file.seek(begin)
        file.write(bytes([code ^ 0x40]))
    monkeypatch.setattr(rounding, "PART", 1)
    with Checkpoint(model) as source:
        found = audit_module.audit(output, source)
    assert [problem.partition(": max")[0] for problem in found.problems] == [name.removesuffix(".weight")]
    assert [weight.module for weight in found.weights] == [
        n.removesuffix(".weight") for n in source.tensors if "layers" in n
    ]


class Kept:
    """A keeper, and a sink, that take notes."""

    def __init__(self, before: set[str]) -> None:
        self.before, self.given, self.told = before, list[str](), list[str]()

    def has(self, names: Iterable[str]) -> bool:
        return self.before.issuperset(names)

    def done(self, names: Iterable[str]) -> None:
        self.told += names

    def rounded(self, module: str, weight: object) -> None:
        self.given.append(f"{module}.weight")

    weight = rounded


@pytest.mark.parametrize("fmt_by_rows", [True, False])
def test_a_keeper_hears_of_every_output_and_what_it_has_is_not_done_again(
    fmt_by_rows: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = tmp_path / "job.yaml"
    yaml.write_text(
        f"global: {{save_path: {tmp_path}}}\nmodel: {{model_path: {model}}}\n"
        "compression: {quantization: {scheme: W4A16_ASYM, ignore_layers: [lm_head]}}\n"
    )
    if not fmt_by_rows:
        monkeypatch.setattr(FORMATS["compressed-tensors"], "row_tensors", no_rows)
    with engine.open_plan(load_run_config(yaml)) as plan:
        first = Kept(set())
        sink: Any = first
        copy = first.given.append
        data_free.data_free(plan, plan.checkpoint, sink, copy=copy, progress=False, keeper=first)
        assert sorted(first.given) == sorted(plan.checkpoint.tensors)
        assert sorted(first.told) == sorted(plan.layout.tensors)
        left = [name for name in plan.checkpoint.tensors if ".1." in name or name == "lm_head.weight"]
        outputs = {output for name in left for output in data_free.outputs_of(plan, name)}
        # What was done in part is done again.
        again = Kept(set(plan.layout.tensors) - outputs - {"model.layers.0.mlp.up_proj.weight_scale"})
        sink, copy = again, again.given.append
        data_free.data_free(plan, plan.checkpoint, sink, copy=copy, progress=False, keeper=again)
        assert sorted(again.given) == sorted([*left, "model.layers.0.mlp.up_proj.weight"])


def test_memory_is_that_of_the_parts(tmp_path: Path) -> None:
    """A weight of 512 MB, all zeros and most of it a hole in the file, per tensor and per channel."""
    config = {"model_type": "strange", "num_hidden_layers": 1, "dtype": "bfloat16"}
    folder = write_headers(tmp_path / "model", config, [{"model.layers.0.mlp.up_proj.weight": ("BF16", (32768, 8192))}])
    peak = "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    base = _run("import quantkit.modifiers.rtn, quantkit.formats.source, quantkit.engine; " + peak)
    for scheme in ("W8A8", "FP8 per tensor"):
        yaml = tmp_path / "run.yaml"
        yaml.write_text(
            f"global: {{save_path: {tmp_path}, overwrite: true, num_threads: 2}}\nmodel: {{model_path: {folder}}}\n"
            f"compression:\n  recipe: {{quant_stage: {{quant_modifiers: {RECIPES[scheme]}}}}}\n"
        )
        found = _run(f"from quantkit.cli import main; assert main(['run', '-c', {str(yaml)!r}]) == 0; " + peak)
        assert found - base < 150_000, "kB above the imports"


def _run(code: str) -> int:
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_tensors_are_written_in_place_by_their_makers_and_none_may_lack(tmp_path: Path) -> None:
    layout = plan_layout([OutputTensor("a", "I32", (5, 3)), OutputTensor("b", "F32", (2,))], 1 << 20)
    value = torch.arange(15, dtype=torch.int32).reshape(5, 3)
    with CheckpointWriter(layout, tmp_path / "output") as writer:
        writer.side_file("config.json", b"{}")
        with pytest.raises(KeyError), writer.in_place(["b"]):
            raise KeyError
        assert writer.missing() == ["a", "b"]  # what was begun and given up is not written
        with pytest.raises(CheckpointError, match="never written: a, b"):
            writer.finish()
    with CheckpointWriter(layout, tmp_path / "output") as writer:
        writer.side_file("config.json", b"{}")
        writer.write("b", torch.zeros(2))
        with writer.in_place(["a"]) as places:
            file, begin = places["a"]
            file.write(value[3:].numpy(), begin + 36)
            assert writer.missing() == ["a"]
            with pytest.raises(CheckpointError, match="'a' is written twice"):
                writer.write("a", value)
            with pytest.raises(CheckpointError, match="'a' is written twice"), writer.in_place(["a"]):
                pass
            with pytest.raises(CheckpointError, match="not part of the planned output"), writer.in_place(["c"]):
                pass
            file.write(value[:3].numpy(), begin)
        assert writer.missing() == [] and sorted(writer.flush()) == ["a", "b"]
        writer.finish()
    assert torch.equal(_loaded(tmp_path / "output")["a"], value)


IN_TWO = """
import sys
from quantkit.cli import main
assert main(["run", "-c", sys.argv[1], "--set", "global.num_threads=2"]) == 0
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy", "transformers")), sep=",")
"""


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8", "FP8_BLOCK", "W4A16_ASYM"])
def test_the_command_does_without_torch(scheme: str, model: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"global: {{save_path: {tmp_path}}}\nmodel: {{model_path: {model}}}\n"
        f"compression: {{quantization: {{scheme: {scheme}, ignore_layers: [lm_head]}}}}\n"
    )
    done = subprocess.run([sys.executable, "-c", IN_TWO, str(yaml)], stdout=subprocess.PIPE, text=True, check=True)
    assert "audit PASSED" in done.stdout and done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("recipe", ["W4A16_ASYM", "FP8_BLOCK", "int8 per tensor"])
def test_other_dtypes_and_large_blocks(
    recipe: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of any length, zeros, subnormals; and blocks that are too large for a cache."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(640, 1152, generator=generator).to(getattr(torch, dtype))
    weight[7] = 0
    weight[8] *= 1e-7
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "num_hidden_layers": 1, "dtype": dtype}))
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, folder / "model.safetensors")
    recipes = [RECIPES[recipe], RECIPES[recipe].replace("W4A16_ASYM", "W8A16_ASYM")]
    if recipe == "FP8_BLOCK":
        recipes = [RECIPES[recipe], LARGE_BLOCKS]
    for index, job in enumerate(recipes):
        found = made(folder, job, tmp_path / f"parts {index}")
        with monkeypatch.context() as patch:
            patch.setattr(FORMATS["compressed-tensors"], "row_tensors", no_rows)
            assert made(folder, job, tmp_path / f"whole {index}") == found


def test_each_ends_with_the_first_error_and_begins_nothing_after() -> None:
    seen: list[int] = []
    gate = threading.Barrier(2)

    def work(item: int) -> None:
        seen.append(item)
        if item < 2:
            gate.wait()
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        each(range(100), work, 2)
    assert sorted(seen) == [0, 1]
    each(range(5), seen.append, 3)
    assert sorted(seen) == [0, 0, 1, 1, 2, 3, 4]
    each([], work, 2)
