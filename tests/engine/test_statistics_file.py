"""Statistics on disk: what is made from them is what one sweep over the full-precision model gives, bit for bit; merged
they are those of all data; and whatever no calibration could have written is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import engine, oneshot
from quantkit.calibrate import _means, calibrate, statistics_folder
from quantkit.calibration import gatherer, replay
from quantkit.calibration.batches import batches
from quantkit.calibration.hooks import CacheRecorder
from quantkit.calibration.layer import Layer
from quantkit.calibration.statistics import Statistics, Wants
from quantkit.calibration.statistics_check import StatisticsFile
from quantkit.calibration.statistics_file import STEM, wants
from quantkit.calibration.sweep import sweep
from quantkit.calibration.symmetric import pack, packed_shape, unpack
from quantkit.cli import main
from quantkit.config.recipe import (
    AWQModifier,
    GPTQModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
    SmoothQuantModifier,
)
from quantkit.config.run_config import (
    CalibrationConfig,
    CompressionConfig,
    DatasetConfig,
    GlobalConfig,
    ModelConfig,
    RunConfig,
)
from quantkit.config.schemes import QuantizationArgs, QuantizationScheme
from quantkit.errors import CalibrationError, CheckpointError, ConfigError, PlanError
from quantkit.formats.fp8_source import open_source
from quantkit.formats.source import WeightSource
from quantkit.from_statistics import from_statistics
from quantkit.live_output import LiveSink
from quantkit.memory import Means
from quantkit.merge_statistics import merge_statistics
from quantkit.models.families import family_of
from quantkit.models.skeleton import Skeleton
from quantkit.modifiers.pipeline import Pipeline
from quantkit.report.calibration import CalibrationReport
from quantkit.report.plan_view import render_plan

from ..e2e.jobs import EXAMPLES
from .ranks import differences, files
from .tiny import make

INT4 = QuantizationScheme("test", QuantizationArgs(4, "int", True, "group", 16))
INT4_ASYM = QuantizationScheme("test", QuantizationArgs(4, "int", False, "group", 16))
Rows = list[list[int]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(count: int, length: int = 32, seed: int = 3) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 128, (length - i % 3,), generator=generator).tolist() for i in range(count)]


def config(folder: Path, *modifiers: Modifier, gather: tuple[str, ...] | None = None) -> RunConfig:
    return RunConfig(
        GlobalConfig(save_path=str(folder)),
        ModelConfig(str(folder / "model")),
        CompressionConfig(recipe=Recipe(modifiers or (GPTQModifier(scheme=INT4, ignore=["lm_head"]),))),
        DatasetConfig(data_path="rows"),
        source=folder,
        stem="out",
        calibration=CalibrationConfig() if gather is None else CalibrationConfig(gather=gather),
    )


def statistics(folder: Path, rows: Rows, name: str = "statistics", *modifiers: Modifier, **options: Any) -> Path:
    return calibrate(config(folder, *modifiers, **options), folder / name, rows=rows, progress=False)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 96])
def test_half_of_a_symmetric_matrix_is_all_of_it(n: int) -> None:
    x = torch.randn(n + 3, n)
    gram = torch.maximum(x.T @ x, (x.T @ x).T)
    packed = pack(gram)
    assert packed.shape == packed_shape(n) and packed.numel() == n * (n + 1) // 2
    assert torch.equal(unpack(packed, n), gram)
    other = unpack(torch.randn(packed_shape(n)), n)
    assert torch.equal(other, other.T), "whatever is in the file"


class Unquantized:
    """The recipe's visitor at the end of a layer's only forward: all inputs, here and behind, are the model's own."""

    pools_below, together = 0, False

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.statistics: Mapping[str, Wants] = {}
        self.ranges = {
            name: pipeline.statistics.get(name, Wants()) | pipeline.ranges.get(name, Wants())
            for name in (*pipeline.statistics, *pipeline.ranges)
        }
        self.caches, self.queries = pipeline.caches, pipeline.queries

    def across(self, index: int) -> str | None:
        return None

    def norms(self, index: int) -> Mapping[str, Collection[str]]:
        return {}

    def prepare(self, layer: Layer) -> None:
        return None

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        raise AssertionError("nothing is wanted before the forward")

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        self.pipeline.prepare(layer)
        first = {name: seen for name, seen in ranges.items() if name in self.pipeline.statistics}
        if first:
            self.pipeline.finish(layer, first)
        last = {name: seen for name, seen in ranges.items() if name in self.pipeline.ranges}
        self.pipeline.observe(layer, last, caches)


def swept(job: RunConfig, rows: Rows) -> LiveSink:
    """The job on statistics of one sweep in memory, no file in between."""
    kept = LiveSink()
    with engine.open_plan(job) as plan:
        skeleton = Skeleton(plan.checkpoint.folder, plan.checkpoint.tensors)
        visitor = Unquantized(Pipeline(plan, kept, CalibrationReport()))
        sweep(skeleton, WeightSource(plan.checkpoint), batches(rows), visitor)
    return kept


def replayed(job: RunConfig, folder: Path) -> tuple[LiveSink, CalibrationReport]:
    kept = LiveSink()
    job = replace(job, dataset=None, calibration=CalibrationConfig(statistics=str(folder)))
    with engine.open_plan(job) as plan:
        assert plan.statistics is not None
        assert "full-precision model gives" in render_plan(plan)
        skeleton = Skeleton(plan.checkpoint.folder, plan.checkpoint.tensors)
        source = WeightSource(plan.checkpoint)
        report = from_statistics(plan, skeleton, source, plan.statistics, kept, progress=False)
        assert set(kept.weights) == set(plan.modules)
        assert set(kept.tensors) == set(plan.rewritten)
    return kept, report


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))


def require_same(one: LiveSink, two: LiveSink) -> None:
    assert one.weights.keys() == two.weights.keys() and one.inputs.keys() == two.inputs.keys()
    for name, a in one.weights.items():
        b = two.weights[name]
        assert same(a.codes, b.codes) and same(a.scale, b.scale) and same(a.zero_point, b.zero_point), name
    for name, inputs in one.inputs.items():
        assert all(map(same, inputs, two.inputs[name])), name
    assert one.tensors.keys() == two.tensors.keys() and one.caches.keys() == two.caches.keys()
    assert all(torch.equal(value, two.tensors[name]) for name, value in one.tensors.items())
    assert all(all(map(torch.equal, pair, two.caches[name])) for name, pair in one.caches.items())
    assert one.queries.keys() == two.queries.keys()
    assert all(torch.equal(scale, two.queries[name]) for name, scale in one.queries.items())


RECIPES: dict[str, tuple[Modifier, ...]] = {
    "gptq": (GPTQModifier(scheme=INT4, ignore=["lm_head"]),),
    "awq": (AWQModifier(scheme=INT4_ASYM, ignore=["lm_head"]),),
    "smoothquant": (SmoothQuantModifier(), GPTQModifier(scheme="W8A8", ignore=["lm_head"])),
    "int8_static": (QuantizationModifier(scheme="W8A8_STATIC_ASYM", ignore=["lm_head"]),),
    "fp8_static": (QuantizationModifier(scheme="FP8", ignore=["lm_head"]),),
    "gptq_static": (GPTQModifier(scheme="W8A8_STATIC", ignore=["lm_head"]),),
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_one_calibration_makes_what_a_sweep_of_the_unquantized_model_makes(model_type: str, tmp_path: Path) -> None:
    make(tmp_path / "model", model_type, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=16)
    rows = tokens(8)
    folder = statistics(tmp_path, rows)
    for name, modifiers in RECIPES.items():
        job = config(tmp_path, *modifiers)
        kept, report = replayed(job, folder)
        require_same(kept, swept(job, rows))
        assert report.tokens == sum(map(len, rows)), name


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_caches_histograms_and_averages_come_from_the_file_too(model_type: str, tmp_path: Path) -> None:
    make(tmp_path / "model", model_type)
    rows = tokens(8)
    folder = statistics(tmp_path, rows)
    for observer in ("mse", "moving_average"):
        inputs = QuantizationArgs(8, "int", True, "tensor", observer=observer)
        scheme = QuantizationScheme("test", QuantizationArgs(8, "int", True, "channel"), inputs)
        job = config(tmp_path, QuantizationModifier(scheme=scheme, ignore=["lm_head"], kv_cache_scheme="fp8"))
        kept, _ = replayed(job, folder)
        assert len(kept.caches) == 3 and len(kept.inputs) == len(kept.weights)
        require_same(kept, swept(job, rows))


@pytest.mark.parametrize("low_data", ["rtn", "all_tokens"])
@pytest.mark.parametrize("portion", [0, replay.PORTION])
def test_experts_without_tokens_borrow_as_in_a_sweep(
    portion: int, low_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a layer's inputs come one by one, since all do not fit."""
    monkeypatch.setattr(replay, "PORTION", portion)
    make(tmp_path / "model", "qwen3_moe", mlp_only_layers=[0], num_experts=16)
    rows = [[1, 2, 3, 2], [3, 1, 1]]
    folder = statistics(tmp_path, rows)
    silent = StatisticsFile(folder).contents.silent
    assert silent and all(".experts." in name for name in silent)
    for modifiers in (
        (GPTQModifier(scheme=INT4, ignore=["lm_head"], min_tokens_per_module=2, low_data=low_data),),
        RECIPES["awq"],
        RECIPES["gptq_static"],
    ):
        job = config(tmp_path, *modifiers)
        kept, report = replayed(job, folder)
        require_same(kept, swept(job, rows))
        assert set(report.silent_experts) == set(silent)


@pytest.mark.parametrize(("every", "model_type"), [(False, "qwen3_moe"), (True, "qwen3_moe"), (True, "deepseek_v3")])
def test_experts_come_in_groups(every: bool, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files, whatever of a layer is in memory at once; an input that all experts read stands there once."""
    make(tmp_path / "model", model_type, mlp_only_layers=[0], **dict.fromkeys(("num_experts", "n_routed_experts"), 8))
    modifier = GPTQModifier(scheme=INT4, ignore=["lm_head"], moe_calibrate_all_experts=every)
    monkeypatch.setattr(gatherer, "PORTION", 70_000)
    kinds = {"gather": ("gram", "histogram", "kv_cache", "queries")}
    whole = statistics(tmp_path, tokens(6), "whole", modifier, **kinds)
    for size in (1, 3):
        monkeypatch.setattr("quantkit.calibrate._means", lambda *_, size=size: Means(2, "disk", size, kept=False))
        groups = statistics(tmp_path, tokens(6), f"groups of {size}", modifier, **kinds)
        assert not differences(files(whole), files(groups))
    assert len(list(whole.glob("*.safetensors"))) > 8
    inputs = StatisticsFile(whole).inputs
    first, last = (inputs[f"model.layers.1.mlp.experts.{i}.up_proj"] for i in (0, 7))
    assert (first is last) == every


def test_a_calibration_keeps_to_its_budget(tmp_path: Path) -> None:
    """The largest of budgets is the whole layer's; a smaller one takes fewer experts; none is too small to say so."""
    make(
        tmp_path / "model",
        "qwen3_moe",
        num_experts=16,
        moe_intermediate_size=4096,
        num_hidden_layers=1,
        mlp_only_layers=[],
    )
    job = config(tmp_path)
    with open_source(tmp_path / "model") as checkpoint:
        family = family_of(checkpoint.config)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        linears = [linear.module for linear in family.linear_weights(shapes) if not linear.head]

        def found(budget: str | None) -> Means:
            within = replace(job, global_=replace(job.global_, memory_budget=budget))
            return _means(within, checkpoint, family, linears)

        assert found(None).experts is None
        # Gram matrices of 16 down projections, 67 MB each, are more than that leaves.
        few = found("1200MB").experts
        assert few is not None and few < 16
        with pytest.raises(PlanError, match=r"needs at least about .* global.memory_budget is 50.0 MB.*num_samples"):
            found("50MB")


def test_experts_that_see_all_tokens(tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen3_moe")
    every = GPTQModifier(scheme=INT4, ignore=["lm_head"], moe_calibrate_all_experts=True)
    rows = tokens(4)
    folder = statistics(tmp_path, rows, "all", every)
    _, report = replayed(config(tmp_path, every), folder)
    assert set(report.expert_tokens.values()) == {sum(map(len, rows))}
    routed = statistics(tmp_path, rows, "routed")
    with pytest.raises(PlanError, match=r"experts saw the tokens routed to them.*moe_calibrate_all_experts: true"):
        replayed(config(tmp_path, every), routed)
    with pytest.raises(PlanError, match=r"experts saw all tokens"):
        replayed(config(tmp_path), folder)


def test_merged_statistics_are_those_of_all_data(tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen3_moe", num_experts=16)
    parts = [[[1, 2, 3, 2], [3, 1, 1]], tokens(5, seed=4), tokens(3, seed=5)]
    folders = [statistics(tmp_path, rows, f"part{i}") for i, rows in enumerate(parts)]
    merged = StatisticsFile(merge_statistics(folders, tmp_path / "merged", progress=False))
    whole = StatisticsFile(statistics(tmp_path, [row for rows in parts for row in rows], "whole"))
    assert StatisticsFile(folders[0]).contents.silent, "an expert is silent in one and not in all"
    assert merged.contents.silent == whole.contents.silent
    assert merged.contents.tokens == whole.contents.tokens and len(merged.contents.data) == 3
    assert merged.inputs.keys() == whole.inputs.keys()
    for name, entry in whole.contents.inputs.items():
        a, b = (file.load(file.inputs[name], wants(("gram", "histogram"))) for file in (merged, whole))
        assert a.gram is not None and b.gram is not None and a.histogram is not None and b.histogram is not None
        assert a.absum is not None and b.absum is not None
        # The model's forward rounds alike only where batches are of one shape.
        assert a.count == entry.count
        torch.testing.assert_close(torch.stack((a.min, a.max)), torch.stack((b.min, b.max)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-3, atol=1e-3 * float(b.gram.abs().max()))
        torch.testing.assert_close(a.absum, b.absum, rtol=1e-3, atol=1e-3)
        assert int(a.histogram.counts.sum()) == int(b.histogram.counts.sum())
    for name in whole.contents.caches:
        assert set(whole.cache(name)) == {"key", "value", "query"}
        torch.testing.assert_close(merged.cache(name), whole.cache(name), rtol=1e-4, atol=1e-5)
    kept, _ = replayed(config(tmp_path), merged.folder)
    assert all(torch.isfinite(q.dequantize()).all() for q in kept.weights.values())


def test_merging_refuses_what_does_not_fit(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    rows = tokens(4)
    one, two = statistics(tmp_path, rows[:2], "one"), statistics(tmp_path, rows[2:], "two")
    with pytest.raises(CalibrationError, match=r"1 of its rows are in .*one too, and would count twice"):
        merge_statistics([one, two, statistics(tmp_path, rows[1:2], "again")], tmp_path / "merged")
    few = statistics(tmp_path, rows[2:], "few", gather=("gram",))
    with pytest.raises(CalibrationError, match=r"few: its statistics have another kinds"):
        merge_statistics([one, few], tmp_path / "merged")
    with pytest.raises(CalibrationError, match="give two or more"):
        merge_statistics([one], tmp_path / "merged")
    make(tmp_path / "model", "llama", intermediate_size=128)
    other = statistics(tmp_path, rows[2:], "other")
    with pytest.raises(CalibrationError, match=r"other: its statistics are of another model"):
        merge_statistics([one, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_recipe_is_told_what_the_statistics_lack(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    bare = statistics(tmp_path, tokens(2), "bare", gather=())
    advice = r"run quantkit calibrate with {} in calibration.gather"
    with pytest.raises(PlanError, match=r"needs Gram matrices of .*k_proj x3, .*" + advice.format("gram")):
        replayed(config(tmp_path), bare)
    inputs = QuantizationArgs(8, "int", True, "tensor", observer="mse")
    scheme = QuantizationScheme("test", QuantizationArgs(8, "int", True, "channel"), inputs)
    with pytest.raises(PlanError, match="needs histograms of .*" + advice.format("histogram")):
        replayed(config(tmp_path, QuantizationModifier(scheme=scheme)), bare)
    cached = QuantizationModifier(scheme="FP8_DYNAMIC", kv_cache_scheme="fp8")
    with pytest.raises(PlanError, match="needs keys and values of .*" + advice.format("kv_cache")):
        replayed(config(tmp_path, cached), bare)
    full = statistics(tmp_path, tokens(2), "full")
    with pytest.raises(PlanError, match="loss: parent runs the model"):
        replayed(config(tmp_path, AWQModifier(scheme=INT4, loss="parent", ignore=["lm_head"])), full)
    with pytest.raises(PlanError, match="is smoothed, and observer mse of its inputs"):
        replayed(config(tmp_path, SmoothQuantModifier(), QuantizationModifier(scheme=scheme)), full)
    # Ranges alone do for these.
    replayed(config(tmp_path, SmoothQuantModifier(), QuantizationModifier(scheme="W8A8_STATIC")), bare)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    """Also of one with the same headers: a fine-tuned one."""
    make(tmp_path / "model", "llama")
    folder = statistics(tmp_path, tokens(2))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][0] += 0.5
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="are of another model"):
        replayed(config(tmp_path), folder)
    make(tmp_path / "model", "llama", rms_norm_eps=1e-3)
    with pytest.raises(PlanError, match=r"whose config.json is not that of"):
        replayed(config(tmp_path), folder)


def test_a_folder_is_complete_or_not_there(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    folder = statistics(tmp_path, tokens(2))
    names = sorted(path.name for path in folder.iterdir())
    parts = [f"{STEM}-0000{i}.safetensors" for i in (1, 2, 3)]
    assert names == [*parts, "statistics.json", "statistics.safetensors.index.json"], "a file for each layer"
    with pytest.raises(CheckpointError, match="exists already"):
        statistics(tmp_path, tokens(2))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(torch.inf)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        statistics(tmp_path, tokens(2), "broken")
    assert [path.name for path in tmp_path.glob("broken*")] == ["broken.partial"], "the first layer is kept"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"has no statistics.json"):
        calibrate(config(tmp_path), tmp_path / "mine", overwrite=True, rows=tokens(2), progress=False)


# Each makes a folder of statistics into one that no calibration has written.
Hostile = Callable[[dict[str, Tensor], dict[str, Any]], object]
FIRST = "model.layers.0.self_attn.q_proj"


def fill(part: str, value: float, at: int = 5) -> Hostile:
    return lambda tensors, _: tensors[f"{FIRST}.{part}"].view(-1)[at : at + 1].fill_(value)


def put(part: str, change: Callable[[Tensor], Tensor]) -> Hostile:
    return lambda tensors, _: tensors.update({f"{FIRST}.{part}": change(tensors[f"{FIRST}.{part}"]).contiguous()})


def entry(key: str, value: Any) -> Hostile:
    return lambda _, main: main["inputs"][FIRST].update({key: value})


def top(key: str, value: Any) -> Hostile:
    return lambda _, main: main.update({key: value})


def rename(old: str, new: str) -> Hostile:
    """Everywhere, so that the folder agrees with itself."""

    def change(tensors: dict[str, Tensor], main: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"{old}.")]:
            tensors[name.replace(old, new)] = tensors.pop(name)
        text = json.dumps(main).replace(json.dumps(old), json.dumps(new))
        main.clear()
        main.update(json.loads(text))

    return change


HOSTILE: dict[str, tuple[Hostile, str]] = {
    "a missing tensor": (lambda t, _: t.pop(f"{FIRST}.gram"), "gram' is missing"),
    "a tensor too many": (lambda t, _: t.update({"x.gram": torch.zeros(1)}), "'x.gram' belongs to no input"),
    "a shape": (put("min", lambda x: x[:-1]), r"min' is F32 \[63\], and not F32 \[64\]"),
    "a whole Gram matrix": (put("gram", lambda x: torch.eye(64)), r"gram' is F32 \[64, 64\], and not F32 \[65, 32\]"),
    "a dtype": (put("max", Tensor.double), r"max' is F64 \[64\]"),
    "histogram dtype": (put("histogram", lambda x: x.float()), "histogram' is F32"),
    "NaN ranges": (fill("min", torch.nan), "min' has NaN or Inf"),
    "infinite ranges": (fill("max", torch.inf), "max' has NaN or Inf"),
    "ranges upside down": (fill("min", 1e6), "smallest value is above its largest"),
    "extremes of others": (fill("extremes", 1e6, at=1), "extremes' do not fit"),
    "negative sums": (fill("absum", -1.0), "absum' is negative"),
    "sums too large": (fill("absum", 1e9), "more than 63 tokens can have"),
    "negative histogram": (fill("histogram", -7), "histogram' does not count"),
    "a histogram of more": (fill("histogram", 1000), "histogram' does not count"),
    "a span that is no power": (fill("span", 5.5, at=0), "span' is 5.5"),
    "NaN span": (fill("span", torch.nan, at=0), "span' is nan"),
    "a span too small": (fill("span", 2.0**-90, at=0), "and not a power of two above"),
    "NaN keys": (lambda t, _: t["model.layers.0.self_attn.key"].fill_(torch.nan), "key' has NaN, Inf or negative"),
    "negative values": (lambda t, _: t["model.layers.1.self_attn.value"].fill_(-1), "value' has NaN, Inf or negative"),
    "NaN in Gram": (fill("gram", torch.nan, at=40), "gram' has products|gram' has sums of squares"),
    "a negative square": (lambda t, _: t[f"{FIRST}.gram"].view(-1)[32:33].neg_(), "gram' has sums of squares"),
    "a Gram that is not definite": (lambda t, _: t[f"{FIRST}.gram"].view(-1)[64:65].fill_(1e7), "products that are"),
    "squares beyond ranges": (lambda t, _: t[f"{FIRST}.gram"].mul_(1e6), "sums of squares that are NaN, negative, or"),
    "squares below sums": (lambda t, _: t[f"{FIRST}.gram"].mul_(1e-6), "absum' does not fit"),
    "a negative count": (entry("count", -5), "count is -5"),
    "a count of zero": (entry("count", 0), "count is 0"),
    "a count that is true": (entry("count", True), "count is True"),
    "a count that is no number": (entry("count", "many"), "count is 'many'"),
    "an endless count": (entry("count", 1 << 70), "and not a whole number"),
    "more batches than tokens": (entry("batches", 1000), "batches is 1000"),
    "channels without end": (entry("channels", 1 << 40), "channels is"),
    "other channels": (entry("channels", 32), r"is F32 \[64\], and not F32 \[32\]"),
    "readers of another": (entry("readers", ["a", "b"]), "not named after the first"),
    "a reader twice": (entry("readers", [FIRST, FIRST]), "has a name twice"),
    "no readers": (entry("readers", []), "not named after the first"),
    "a reader of two": (entry("readers", [FIRST, "model.layers.0.mlp.up_proj"]), "is said to read two inputs"),
    "more in an entry": (entry("path", "/etc/passwd"), "is not an object of readers"),
    "a silent reader": (top("silent", [FIRST]), "is said to have read nothing, and has an input"),
    "no inputs": (top("inputs", {}), "inputs is empty"),
    "inputs in a list": (top("inputs", []), "inputs is not an object"),
    "unknown kinds": (top("kinds", ["gram", "code"]), "kinds is"),
    "another version": (top("version", 99), "is of version 99"),
    "another format": (top("format", "pickle"), "does not say that it describes"),
    "no data": (top("data", []), "data is empty"),
    "rows that are paths": (
        lambda _, main: main["data"][0].update(rows=["../../x"] * 2),
        "data.rows are not hashes of rows",
    ),
    "a fingerprint": (lambda _, main: main["fingerprint"].update(model="abc"), "fingerprint is not one"),
    "another model": (lambda _, main: main["fingerprint"].update(model="0" * 64), "are of another model"),
    "a Linear out of the folder": (rename(FIRST, "../../etc/x"), "is no Linear of"),
    "the head": (rename(FIRST, "lm_head"), "not in it; run quantkit calibrate|needs inputs"),
    "a norm": (rename(FIRST, "model.layers.0.input_layernorm"), "is no Linear of"),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    make(folder / "model", "llama")
    statistics(folder, tokens(2))
    return folder


def rewritten(source: Path, target: Path, change: Hostile) -> Path:
    """`source` with what `change` does to its tensors and its description."""
    tensors: dict[str, Tensor] = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    main_file = json.loads((source / "statistics.json").read_text())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, main_file)
    target.mkdir()
    save_file(tensors, target / f"{STEM}.safetensors")
    (target / "statistics.json").write_text(json.dumps(main_file))
    return target


def test_an_honest_folder_written_by_others_is_read(honest: Path, tmp_path: Path) -> None:
    folder = rewritten(honest / "statistics", tmp_path / "same", lambda *_: None)
    one, two = (replayed(config(honest), f)[0] for f in (honest / "statistics", folder))
    require_same(one, two)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_statistics_are_refused(kind: str, honest: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[kind]
    folder = rewritten(honest / "statistics", tmp_path / "hostile", change)
    job = replace(config(honest), global_=GlobalConfig(save_path=str(tmp_path)))
    with pytest.raises((CheckpointError, PlanError), match=message) as caught:
        engine.run(job, statistics=folder, progress=False)
    assert str(folder) in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_files_outside_the_folder_are_not_read(honest: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(honest / "statistics", tmp_path / "hostile")
    index = folder / "statistics.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace(f"{STEM}-00001.safetensors", "../model/model.safetensors"))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        StatisticsFile(folder)
    index.write_text(text)
    part = folder / f"{STEM}-00001.safetensors"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the model folder"):
        StatisticsFile(folder)
    part.unlink()
    part.write_bytes((tmp_path / "elsewhere").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        StatisticsFile(folder)
    with pytest.raises(CheckpointError, match=r"statistics: .*no statistics\.json"):
        StatisticsFile(honest / "model")


YAML = f"""
model: {{model_path: {EXAMPLES / "models" / "tiny-llama"}}}
compression: {{name: quantization, quantization: {{name: fp8_static, ignore_layers: [lm_head]}}}}
"""
DATASET = f"""
dataset: {{data_path: {EXAMPLES / "data" / "calibration.jsonl"}, num_samples: 8, max_seq_length: 64}}
"""


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two machines calibrate, a third one quantizes twice, without data and without a tokenizer."""
    (tmp_path / "with.yaml").write_text(YAML + DATASET)
    (tmp_path / "job.yaml").write_text(YAML)
    made = [str(tmp_path / name) for name in ("a", "b", "all")]
    command = ["calibrate", "-c", str(tmp_path / "with.yaml"), "--set", "dataset.shuffle=true"]
    assert main([*command, "-o", made[0]]) == 0
    assert main([*command, "-o", made[1], "--set", "global.seed=7", "--set", "dataset.num_samples=2"]) in (0, 2)
    assert main(["merge-statistics", made[0], made[0], "-o", made[2]]) == 2
    assert "8 of its rows are in" in capsys.readouterr().err
    plain = tmp_path / "plain"
    shutil.copytree(EXAMPLES / "models" / "tiny-llama", plain)
    for name in plain.glob("*token*"):
        name.unlink()
    job = ["-c", str(tmp_path / "job.yaml"), "--model-path", str(plain), "--save-path", str(tmp_path)]
    assert main(["run", *job]) == 2, "without statistics there has to be data"
    assert "dataset" in capsys.readouterr().err
    assert main(["plan", *job, "--statistics", made[0]]) == 0
    assert "the full-precision model gives it" in capsys.readouterr().out
    assert main(["run", *job, "--statistics", made[0]]) == 0
    assert "audit PASSED" in capsys.readouterr().out
    record = json.loads((tmp_path / "job" / "quantkit_config.json").read_text())
    assert record["statistics"]["rows"] == 8 and record["statistics"]["dtype"]
    assert "8 rows, " in (tmp_path / "job" / "README.md").read_text()
    gptq = ["--set", "compression.quantization.name=int4_gptq"]
    assert main(["run", *job, "--overwrite", "--set", f"calibration.statistics={made[0]}", *gptq]) == 0
    assert main(["run", *job, "--statistics", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_oneshot_takes_statistics_of_a_path_and_of_a_model(model_type: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", model_type)
    folder = statistics(tmp_path, tokens(4))
    recipe = [SmoothQuantModifier(), GPTQModifier(scheme="W8A8_STATIC", ignore=["lm_head"])]
    options: dict[str, Any] = {"recipe": recipe, "statistics": folder, "progress": False}
    streamed = oneshot(tmp_path / "model", output_dir=tmp_path / "streamed", **options)
    oneshot(model, output_dir=tmp_path / "live", **options)
    one, two = (load_file(path / "model.safetensors") for path in (streamed, tmp_path / "live"))
    assert one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())
    with pytest.raises(ConfigError, match="dataset: is missing"):
        oneshot(tmp_path / "model", recipe=recipe, output_dir=tmp_path / "other")
    other = make(tmp_path / "other", model_type, intermediate_size=128)
    with pytest.raises(PlanError, match="are of another model"):
        oneshot(other, **options)


def test_statistics_go_beside_the_output_unless_told(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    job = config(tmp_path)
    assert calibrate(job, rows=tokens(2), progress=False) == statistics_folder(job) == tmp_path / "out-statistics"
    with pytest.raises(ConfigError, match="the section dataset is missing"):
        calibrate(replace(config(tmp_path, QuantizationModifier(scheme="W8A8")), dataset=None), tmp_path / "x")
