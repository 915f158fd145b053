"""One forward a layer: the same statistics as two where nothing changes in between, true order where something does."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.calibration import layer_run
from quantkit.calibration.batches import Batch, batches
from quantkit.calibration.forward import embed, tensors_in
from quantkit.calibration.hooks import CacheRecorder
from quantkit.calibration.layer import Layer, SweepReport
from quantkit.calibration.lockstep import explore
from quantkit.calibration.statistics import Statistics, Wants
from quantkit.calibration.sweep import sweep
from quantkit.checkpoint.native import kept_memory
from quantkit.errors import CalibrationError
from quantkit.models import fused_block
from quantkit.models.mappings import Smoothing
from quantkit.modifiers.working import Working

from .test_sweep import modules_of, opened, rows
from .tiny import make

EVERYTHING = Wants(gram=True, histogram=True, averages=True)


class Watcher:
    """A visitor that wants everything of everything, and keeps it."""

    pools_below, together = 0, False

    def __init__(self, names: list[str]) -> None:
        self.statistics = dict.fromkeys(names, Wants(gram=True))
        self.ranges = dict.fromkeys(names, EVERYTHING)
        self.caches: tuple[str, ...] = ()
        self.queries: tuple[str, ...] = ()
        self.finished: list[tuple[str, ...]] = []
        self.seen: dict[str, Statistics] = {}
        self.last: dict[str, Statistics] = {}
        self.recorders: dict[str, CacheRecorder] = {}

    def across(self, index: int) -> str | None:
        return None

    def norms(self, index: int) -> dict[str, tuple[str, ...]]:
        return {}

    def prepare(self, layer: Layer) -> None:
        pass

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        self.finished.append(tuple(name.removeprefix(f"{layer.prefix}.") for name in statistics))
        self.seen.update(statistics)

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        self.last.update(ranges)
        self.recorders.update(caches)


def swept(
    folder: Path, data: list[Batch], forwards: int | str, kind: type[Watcher] = Watcher, caches: bool = False
) -> tuple[Any, SweepReport]:
    skeleton, source = opened(folder)
    visitor = kind(modules_of(skeleton, source))
    if caches:
        visitor.caches = tuple(f"model.layers.{i}.self_attn" for i in range(3))
    report = sweep(skeleton, source, data, visitor, forwards=forwards)
    assert all(not m._forward_pre_hooks and "forward" not in m.__dict__ for m in skeleton.layers.modules())
    assert all(p.is_meta for p in skeleton.model.parameters())
    return visitor, report


def tensors(seen: Statistics) -> list[Tensor]:
    parts = [seen.min, seen.max, seen.absum, seen.gram, seen.averages]
    parts += [] if seen.histogram is None else [seen.histogram.counts, seen.histogram.span]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "granite"])
def test_one_forward_sees_what_two_see_if_nothing_changes(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every input of every layer, padded batches among them, bit by bit; so layers feed each other the same, too."""
    make(tmp_path, model_type, dtype)
    data = batches(rows([24, 24, 23, 20, 9, 1]), 48)
    caches = model_type != "phi3"
    (one, first), (two, second) = (swept(tmp_path, data, n, caches=caches) for n in (1, 2))
    assert (first.once, len(first.twice), second.once, len(second.twice)) == (3, 0, 0, 3)
    assert one.seen.keys() == two.seen.keys() and one.last.keys() == two.last.keys()
    for name, seen in one.seen.items():
        for mine, theirs in ((seen, two.seen[name]), (one.last[name], two.last[name])):
            assert mine.count == theirs.count == 101
            assert all(map(torch.equal, tensors(mine), tensors(theirs))), name
    for name, recorder in one.recorders.items():
        assert recorder.key is not None and torch.equal(recorder.key, two.recorders[name].key)
        assert torch.equal(recorder.value, two.recorders[name].value)
    assert bool(one.recorders) == caches


def test_inputs_are_worked_on_one_after_the_other(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    one, _ = swept(tmp_path, batches(rows([16] * 3), 16), "auto")
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layer = [attention, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert one.finished == layer * 3
    q, k, v = (one.seen[f"model.layers.1.{name}"] for name in attention)
    assert q is k is v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_is_made_by_the_weights_put_in_before_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """v_proj and up_proj become zero: so do the inputs of o_proj and down_proj behind them, in one forward."""

    class Zeroing(Watcher):
        def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
            super().finish(layer, statistics)
            for name in statistics:
                if name.endswith(("v_proj", "up_proj")):
                    layer.put(f"{name}.weight", torch.zeros_like(layer.tensor(f"{name}.weight")))

    make(tmp_path, "llama", dtype)
    data = batches(rows([16] * 4), 16)
    for forwards in (1, 2):
        visitor, _ = swept(tmp_path, data, forwards, Zeroing)
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.1.{part}"
            assert float(visitor.last[name].tensor_absmax) == 0
            assert (float(visitor.seen[name].tensor_absmax) == 0) == (forwards == 1)
    inputs = [visitor.seen[f"model.layers.{i}.self_attn.q_proj"].max for i in range(3)]
    assert torch.equal(inputs[0], inputs[1]) and torch.equal(inputs[0], inputs[2]), "the layers add nothing"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_smoothing_keeps_what_the_layer_computes(model_type: str, tmp_path: Path) -> None:
    """The batches that wait are divided as the norm in front is; each next layer's input stays what it was."""
    make(tmp_path, model_type)

    class Smoothing_(Watcher):
        s = torch.logspace(-1, 1, 64)

        def norms(self, index: int) -> dict[str, tuple[str, ...]]:
            prefix = f"model.layers.{index}.self_attn."
            return {f"model.layers.{index}.input_layernorm": tuple(f"{prefix}{p}_proj" for p in "qkv")}

        def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
            before = {name: seen.copy() for name, seen in statistics.items()}
            super().finish(layer, statistics)
            for norm, readers in self.norms(layer.index).items():
                if readers[0] in statistics:
                    working = Working(layer, statistics)
                    working.smooth(Smoothing(layer.index, norm, readers, "norm"), self.s)
                    working.settle()
            self.seen.update(before)

    data = batches(rows([24, 24, 17]), 48)
    plain, _ = swept(tmp_path, data, 1)
    smooth, _ = swept(tmp_path, data, 1, Smoothing_)
    for name, seen in smooth.seen.items():
        torch.testing.assert_close(seen.max, plain.seen[name].max, rtol=1e-3, atol=1e-4)
        divided = Smoothing_.s if name.endswith(("q_proj", "k_proj", "v_proj")) else torch.ones(1)
        torch.testing.assert_close(smooth.last[name].max, plain.last[name].max / divided, rtol=1e-3, atol=1e-3)


def test_the_last_layer_ends_behind_its_last_input(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    calls: list[str] = []

    class Counting(Watcher):
        def prepare(self, layer: Layer) -> None:
            down = layer.linears[f"{layer.prefix}.mlp.down_proj"]
            self.handle = down.register_forward_hook(lambda *_: calls.append(layer.prefix))

        def observe(self, *args: Any) -> None:
            super().observe(*args)
            self.handle.remove()

    swept(tmp_path, batches(rows([16] * 3), 16), 1, Counting)
    # One more call is the probe's.
    assert [calls.count(f"model.layers.{i}") for i in range(3)] == [4, 4, 1]


def test_what_waits_is_measured(tmp_path: Path) -> None:
    """In front of o_proj: the norm's output, what q, k and v gave, rotated queries and keys, and the input."""
    make(tmp_path, "llama")
    skeleton, source = opened(tmp_path)
    hidden, calls = embed(skeleton, source, batches(rows([8])))
    skeleton.materialize(1, source)
    layer = Layer(1, skeleton.layer_prefix(1), skeleton.linears(1), skeleton.stored(1))
    call = calls[0][1]
    known = [hidden.view(0), *tensors_in([call.args, call.kwargs])]
    view = hidden.view(0)
    with torch.no_grad():
        course = explore(layer, layer.linears, {}, lambda: skeleton.forward(1, view, call), view.shape[1], known)
    assert [len(readers) for readers in course.inputs] == [3, 1, 2, 1]
    elements = course.bytes_per_position / 4
    assert 64 + (64 + 32 + 32) + 64 <= elements <= 2 * (64 + (64 + 32 + 32) + 64)


def test_memory_is_kept_within_the_sweep_and_given_back_behind_it() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = [torch.ones(4 << 20) for _ in range(8)]
        assert len(parts) == 8
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_memory():
        # Where the heap is in pieces, the first passes still make it grow.
        kept = min(faults() for _ in range(4))
    assert faults() > 10 * max(kept, 1)


# Where one forward does not do


def test_the_bound_on_what_waits_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "llama")
    data = batches(rows([16] * 3), 16)
    monkeypatch.setattr(layer_run, "HELD_BYTES", 10_000)
    _, report = swept(tmp_path, data, "auto")
    assert report.once == 0 and len(report.twice) == 3
    assert "would wait between its Linears" in report.twice["model.layers.0"]
    _, report = swept(tmp_path, data, 1)
    assert (report.once, report.twice) == (3, {}), "who asks for one forward has said that memory is there"


def test_layers_with_experts_run_twice(tmp_path: Path) -> None:
    make(tmp_path, "qwen3_moe")  # its first layer is dense
    _, report = swept(tmp_path, batches(rows([16] * 3), 16), "auto")
    assert report.once == 1
    assert report.twice == dict.fromkeys(("model.layers.1", "model.layers.2"), "which experts run depends on the data")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1: one forward does not do: which experts"):
        swept(tmp_path, batches(rows([16])), 1)


def test_an_unusual_forward_runs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    make(tmp_path, "llama")
    data = batches(rows([16] * 3), 16)
    usual = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: usual(self, usual(self, x)))
    _, report = swept(tmp_path, data, "auto")
    assert report.twice["model.layers.2"] == "model.layers.2.mlp.gate_proj is called 2 times in a forward"

    def autocast(self: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return usual(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", autocast)
    _, report = swept(tmp_path, data, "auto")
    assert report.once == 3, "autocast that is off is nothing"

    def gradients(self: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return usual(self, x).detach()

    monkeypatch.setattr(LlamaMLP, "forward", gradients)
    _, report = swept(tmp_path, data, "auto")
    assert "gate_proj is called under autocast or with gradients" in report.twice["model.layers.0"]


def test_readers_of_more_than_the_norm_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Smooth(Watcher):
        def norms(self, index: int) -> dict[str, tuple[str, ...]]:
            prefix = f"model.layers.{index}."
            return {f"{prefix}post_attention_layernorm": (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")}

    make(tmp_path, "llama")
    data = batches(rows([16] * 3), 16)
    _, report = swept(tmp_path, data, "auto", Smooth)
    assert report.once == 3
    usual = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: usual(self, 2 * x))
    _, report = swept(tmp_path, data, "auto", Smooth)
    expected = "model.layers.0.mlp.gate_proj does not read just what model.layers.0.post_attention_layernorm gives"
    assert report.once == 0 and report.twice["model.layers.0"] == expected


@pytest.mark.parametrize(("order", "expected"), [("down", "comes to its end where"), ("up", "does not always read")])
def test_a_batch_that_goes_another_way_stops_the_run(
    order: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the probe of 8 tokens did not show: rows of 16 leave a Linear out, or give one another input."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    usual = LlamaMLP.forward

    def other(self: Any, x: Tensor) -> Tensor:
        if x.shape[1] <= 8:
            return usual(self, x)
        if order == "down":
            return self.gate_proj(x)[..., :64] + self.up_proj(x)[..., :64]
        return self.down_proj(self.gate_proj(x) * self.up_proj(2 * x))

    make(tmp_path, "llama")
    monkeypatch.setattr(LlamaMLP, "forward", other)
    monkeypatch.setattr(fused_block, "_mlp", lambda module: None)  # which would not call it
    with pytest.raises(CalibrationError, match=expected) as error:
        swept(tmp_path, batches(rows([16] * 3), 16), "auto")
    assert "model.layers.0" in str(error.value) and "calibration_forwards: 2" in str(error.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_ended_leaves_nothing_behind(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second batch, while the first waits and the third has not begun: hooks go, and no forward lives on."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    usual, alive = LlamaMLP.forward, []

    def failing(self: nn.Module, x: Tensor) -> Tensor:
        alive.append(1)
        try:
            if len(alive) == 3 and x.shape[1] > 8:
                raise error("enough")
            return usual(self, x)
        finally:
            alive.pop()

    make(tmp_path, "llama")
    skeleton, source = opened(tmp_path)
    monkeypatch.setattr(LlamaMLP, "forward", failing)
    monkeypatch.setattr(fused_block, "_mlp", lambda module: None)
    with pytest.raises(error, match="enough"):
        sweep(skeleton, source, batches(rows([16] * 4), 16), Watcher(modules_of(skeleton, source)))
    assert not alive
    assert all(not m._forward_pre_hooks and "forward" not in m.__dict__ for m in skeleton.layers.modules())


def test_activations_that_are_not_finite_name_linear_and_samples(tmp_path: Path) -> None:
    make(tmp_path, "llama")

    class Spoiling(Watcher):
        def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
            if layer.index == 1 and any(name.endswith("v_proj") for name in statistics):
                layer.tensor(f"{layer.prefix}.self_attn.v_proj.weight")[0, 0] = torch.nan

    with pytest.raises(
        CalibrationError, match=r"layers\.1\.self_attn\.o_proj, calibration samples 0, 1: NaN or Inf in 2 of 64"
    ):
        swept(tmp_path, batches(rows([8, 8, 16]), 16), "auto", Spoiling)
