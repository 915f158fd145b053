"""The sweep: the streamed forward is the model's own, statistics are those of hooks on the whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkit.calibration.batches import Batch, batches
from quantkit.calibration.forward import embed, forward
from quantkit.calibration.hooks import CacheRecorder
from quantkit.calibration.layer import Layer, SweepReport
from quantkit.calibration.statistics import Statistics, Wants
from quantkit.calibration.sweep import sweep
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.models.attention import blockwise, single
from quantkit.models.experts import Experts
from quantkit.models.fused_norm import fused
from quantkit.models.packed_linear import packed
from quantkit.models.skeleton import Skeleton

from .tiny import CONFIGS, FileSource, make

MOE = [name for name, config in CONFIGS.items() if any("experts" in key or key == "moe_k" for key in config)]


class Recorder:
    """A visitor that keeps what it is given: in a first forward if it is to have two, else in the only one."""

    def __init__(self, second_forward: bool = False, wants: Wants | None = None) -> None:
        self.second_forward, self.wanted = second_forward, wants or Wants()
        self.statistics: dict[str, Wants] = {}
        self.ranges: dict[str, Wants] = {}
        self.caches: tuple[str, ...] = ()
        self.queries: tuple[str, ...] = ()
        self.pools_below, self.together = 0, False
        self.found: dict[str, Statistics] = {}
        self.recorders: dict[str, CacheRecorder] = {}
        self.layers: list[str] = []

    def want(self, modules: Sequence[str]) -> Recorder:
        wanted = dict.fromkeys(modules, self.wanted)
        self.statistics, self.ranges = (wanted, {}) if self.second_forward else ({}, wanted)
        return self

    def across(self, index: int) -> str | None:
        return None

    def norms(self, index: int) -> dict[str, tuple[str, ...]]:
        return {}

    def prepare(self, layer: Layer) -> None:
        assert all(not p.is_meta for linear in layer.linears.values() for p in linear.parameters())

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        self.layers.append(layer.prefix)
        self.found.update(statistics)

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        self.layers.append(layer.prefix)
        self.found.update(ranges)
        self.recorders.update(caches)


def rows(lengths: Sequence[int], vocabulary: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def opened(folder: Path, **options: Any) -> tuple[Skeleton, FileSource]:
    source = FileSource(folder)
    return Skeleton(folder, source.names(), **options), source


def modules_of(skeleton: Skeleton, source: FileSource) -> list[str]:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    return [linear.module for linear in skeleton.family.linear_weights(shapes) if not linear.head]


def run(folder: Path, data: list[Batch], visitor: Any, modules: list[str] | None = None) -> SweepReport:
    skeleton, source = opened(folder)
    return sweep(skeleton, source, data, visitor.want(modules or modules_of(skeleton, source)))


def streamed(skeleton: Skeleton, source: FileSource, data: list[Batch]) -> list[Tensor]:
    """Logits of every batch, a layer in memory at a time."""
    with torch.no_grad():
        hidden, calls = embed(skeleton, source, data)
        for index in range(skeleton.num_layers):
            skeleton.materialize(index, source)
            forward(skeleton, index, data, calls, hidden)
            skeleton.drop(index, source)
        with skeleton.outer(source, head=True):
            return [skeleton.head(hidden.view(i)) for i in range(len(hidden))]


def whole(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    from transformers import AutoModelForCausalLM

    # Experts one by one: Transformers' grouped product knows no fp64.
    options = {"attn_implementation": attention, "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def input_ranges(folder: Path, data: list[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per-channel min and max of every Linear's input over real tokens, by hooks on the whole model."""
    model = whole(folder)
    seen: dict[str, list[Tensor]] = {}
    mask: list[Tensor] = []

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            seen.setdefault(name, []).append(flat[mask[0]])

        return record

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in data:
            real = torch.ones_like(batch.input_ids) if batch.mask is None else batch.mask
            mask[:] = [real.reshape(-1).bool()]
            model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False, output_router_logits=False)
    joined = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: (x.amin(0), x.amax(0)) for name, x in joined.items()}


# The streamed forward


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_streamed_logits_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    make(tmp_path, model_type)
    data = batches(rows([24, 24, 20, 5]), 64)
    skeleton, source = opened(tmp_path)
    eager = skeleton.model.config._attn_implementation == "eager"
    model = whole(tmp_path, attention="eager" if eager else "sdpa")
    exact = whole(tmp_path, torch.float64, model.config._attn_implementation) if model_type in MOE else None
    for batch, logits in zip(data, streamed(skeleton, source, data), strict=True):
        real = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool()
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask, "use_cache": False}
        with torch.no_grad():
            expected = model(**inputs).logits[real]
            if exact is None:
                assert torch.equal(logits[real], expected)
                continue
            # Gate and up projection are one product there and two here, so sums have another order: neither is nearer
            # to the exact result than the other, up to chance.
            truth = exact(**inputs).logits[real]
        assert float((logits[real] - truth).abs().max()) <= 4 * float((expected - truth).abs().max())


def test_layers_that_attend_to_what_others_chose_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "deepseek_v32")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "indexer_types": ["full", "shared", "full"]}))
    with pytest.raises(CheckpointError, match="indexer_types: some layers attend to what a layer before them"):
        opened(tmp_path)


def test_bf16_stays_within_its_rounding(tmp_path: Path) -> None:
    """Attention runs by blocks there; against fp32 it is not worse than Transformers' own bf16 attention."""
    make(tmp_path, "llama", torch.bfloat16)
    data = batches(rows([100]), 128)
    skeleton, source = opened(tmp_path)
    assert skeleton.dtype == torch.bfloat16
    ours = streamed(skeleton, source, data)[0].float()
    with torch.no_grad():
        exact = whole(tmp_path)(input_ids=data[0].input_ids).logits
        eager = whole(tmp_path, torch.bfloat16, "eager")(input_ids=data[0].input_ids).logits.float()
    assert (ours - exact).square().mean() <= 1.5 * (eager - exact).square().mean()


@pytest.mark.parametrize(("tokens", "heads", "groups"), [(1, 2, 2), (127, 4, 2), (128, 4, 4), (129, 4, 1), (300, 8, 2)])
def test_blockwise_attention_is_causal_attention(tokens: int, heads: int, groups: int) -> None:
    query, key, value = (torch.randn(2, n, tokens, 16, dtype=torch.float64) for n in (heads, groups, groups))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(blockwise(query, key, value, 0.25), expected.transpose(1, 2))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_is_attention(heads: int, groups: int, masked: bool) -> None:
    query, key, value = torch.randn(2, heads, 1, 16), torch.randn(2, groups, 37, 16), torch.randn(2, groups, 37, 24)
    mask = (torch.arange(37) >= torch.tensor([[0], [9]]))[:, None, None] if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(single(query, key, value, 0.25, mask), expected.transpose(1, 2))


def test_rows_of_one_batch_or_of_many_give_the_same_logits(tmp_path: Path) -> None:
    make(tmp_path, "qwen3")
    skeleton, source = opened(tmp_path)
    tokens = rows([16] * 4)
    together = streamed(skeleton, source, batches(tokens, 64))[0]
    apart = torch.cat(streamed(skeleton, source, batches(tokens, 16)))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_layers_are_dropped_and_their_tensors_released(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    skeleton, source = opened(tmp_path)
    alive: list[int] = []

    class Watcher(Recorder):
        def observe(self, *_: Any) -> None:
            alive.append(sum(any(not p.is_meta for p in each.parameters()) for each in skeleton.layers))

    sweep(skeleton, source, batches(rows([8])), Watcher().want(modules_of(skeleton, source)))
    assert alive == [1, 1, 1]
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert set(source.released) == source.names() - {"lm_head.weight"}


# Statistics


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("lengths", [[24, 24, 24], [24, 20, 9, 1]])
def test_statistics_are_those_of_hooks_on_the_whole_model(model_type: str, lengths: list[int], tmp_path: Path) -> None:
    make(tmp_path, model_type)
    data = batches(rows(lengths), 48)
    visitor = Recorder()
    report = run(tmp_path, data, visitor)
    assert report == SweepReport(sum(lengths))
    expected = input_ranges(tmp_path, data)
    assert set(visitor.found) >= set(expected) - {"lm_head"}
    for name, statistics in visitor.found.items():
        assert statistics.count == sum(lengths)
        assert torch.equal(statistics.min, expected[name][0]), name
        assert torch.equal(statistics.max, expected[name][1]), name


def test_linears_that_read_one_tensor_share_one_object(tmp_path: Path) -> None:
    make(tmp_path, "qwen3")
    visitor = Recorder()
    run(tmp_path, batches(rows([16, 16, 7]), 16), visitor)
    found = visitor.found
    for layer in ("model.layers.0", "model.layers.2"):
        q, k, v = (found[f"{layer}.self_attn.{p}_proj"] for p in "qkv")
        assert q is k is v
        assert found[f"{layer}.mlp.gate_proj"] is found[f"{layer}.mlp.up_proj"]
        assert found[f"{layer}.self_attn.o_proj"] is not q
        assert found[f"{layer}.mlp.down_proj"] is not found[f"{layer}.mlp.up_proj"]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_padding_has_no_effect(model_type: str, tmp_path: Path) -> None:
    """Rows of unequal length, padded into one batch or each on its own, with whatever token as the pad."""
    make(tmp_path, model_type)
    tokens = rows([24, 20, 19])
    found = []
    for data in (batches(tokens, 128, pad_id=0), batches(tokens, 128, pad_id=77), batches(tokens, 1)):
        visitor = Recorder()
        run(tmp_path, data, visitor)
        found.append(visitor.found)
    assert found[0].keys() == found[2].keys()
    for name, padded in found[0].items():
        assert torch.equal(padded.min, found[1][name].min) and torch.equal(padded.max, found[1][name].max)
        # Alone, a row goes through products of other shapes: fp32 sums in another order.
        torch.testing.assert_close(padded.max, found[2][name].max, rtol=1e-4, atol=1e-4)
        assert padded.count == found[2][name].count


# MiMo and gpt-oss, whose attention has sinks, run on `eager` alone, and `input_ranges` on `sdpa`.
@pytest.mark.parametrize("model_type", [name for name in MOE if name not in ("mimo_v2_flash", "gpt_oss")])
def test_experts_see_the_tokens_that_are_routed_to_them(model_type: str, tmp_path: Path) -> None:
    make(tmp_path, model_type)
    data = batches(rows([64] * 4), 128)
    visitor = Recorder()
    report = run(tmp_path, data, visitor)
    assert report.silent_experts == []
    expected = input_ranges(tmp_path, data)
    renames = opened(tmp_path)[0].family.renames
    experts: dict[str, int] = {}
    for name, statistics in visitor.found.items():
        if ".experts." not in name:
            for here, there in renames:
                name = name.replace(there, here)
            low, high = expected[name]
            torch.testing.assert_close(statistics.min, low, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(statistics.max, high, rtol=1e-4, atol=1e-4)
        elif name.endswith((".gate_proj", ".w1")):
            layer = name.partition(".experts.")[0]
            experts[layer] = experts.get(layer, 0) + statistics.count
            up = name.replace("gate_proj", "up_proj").replace(".w1", ".w3")
            assert visitor.found[up] is statistics
    # Every token goes to two experts; to one in Llama 4.
    assert experts and set(experts.values()) == {(1 if model_type == "llama4_text" else 2) * 4 * 64}


def test_expert_names_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, "mixtral")
    skeleton, source = opened(tmp_path)
    names = [name for name in skeleton.linears(0) if ".experts.0." in name]
    assert names == [f"model.layers.0.block_sparse_moe.experts.0.{part}" for part in ("w1", "w3", "w2")]
    assert all(f"{name}.weight" in source.names() for name in names)


def test_an_expert_without_tokens_borrows_from_the_others_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1])
    visitor = Recorder()
    report = run(tmp_path, batches(rows([1])), visitor)  # one token reaches two of four experts
    silent = {name.split(".experts.")[1].split(".")[0] for name in report.silent_experts}
    assert len(silent) == 2 and len(report.silent_experts) == 6
    warning = capsys.readouterr().err
    assert "model.layers.2" in warning and all(expert in warning for expert in silent)
    prefix = "model.layers.2.mlp.experts"
    reached = sorted({"0", "1", "2", "3"} - silent)
    expected = torch.stack([visitor.found[f"{prefix}.{e}.down_proj"].max for e in reached]).amax(0)
    for expert in silent:
        borrowed = visitor.found[f"{prefix}.{expert}.down_proj"]
        assert torch.equal(borrowed.max, expected) and borrowed.count == 0


def test_all_tokens_go_to_every_expert_if_asked_for(tmp_path: Path) -> None:
    """The output stays that of the routed experts, so a layer behind sees the same."""
    make(tmp_path, "qwen3_moe")
    skeleton, source = opened(tmp_path)
    modules = modules_of(skeleton, source)
    data = batches(rows([24, 20]), 48)
    routed, everyone = Recorder(second_forward=True), Recorder(second_forward=True)
    sweep(skeleton, source, data, routed.want(modules))
    sweep(skeleton, source, data, everyone.want(modules), all_experts=True)
    experts = [name for name in modules if ".experts." in name]
    assert {everyone.found[name].count for name in experts} == {44}
    assert {routed.found[name].count for name in experts} != {44}
    first, other = (f"model.layers.1.mlp.experts.{i}.gate_proj" for i in (0, 1))
    assert everyone.found[first] is everyone.found[other]
    last = "model.layers.2.self_attn.q_proj"
    assert torch.equal(routed.found[last].max, everyone.found[last].max)


def test_keys_and_values_are_measured_as_they_are_cached(tmp_path: Path) -> None:
    make(tmp_path, "qwen3")
    tokens = rows([24, 17])
    visitor = Recorder()
    visitor.caches = tuple(f"model.layers.{i}.self_attn" for i in range(3))
    run(tmp_path, batches(tokens, 64), visitor, ["model.layers.2.mlp.down_proj"])
    model = whole(tmp_path)
    expected = torch.zeros(3, 2, 2, 16)
    for row in tokens:
        with torch.no_grad():
            cache = model(input_ids=torch.tensor([row]), use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            seen = torch.stack([x.abs().amax((0, 2)) for x in (layer.keys, layer.values)])
            expected[i] = torch.maximum(expected[i], seen)
    for i, name in enumerate(visitor.caches):
        recorder = visitor.recorders[name]
        assert recorder.key is not None and recorder.value is not None
        torch.testing.assert_close(torch.stack((recorder.key, recorder.value)), expected[i], rtol=1e-4, atol=1e-5)
        key, value = (recorder.heads()[part] for part in ("key", "value"))
        assert key is not None and value is not None
        torch.testing.assert_close(torch.stack((key, value)), expected[i].amax(-1), rtol=1e-4, atol=1e-5)


# Visitors


def test_weights_put_in_place_by_prepare_run_in_the_one_forward(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    make(tmp_path / "changed", "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = (tensor * 8).round() / 8
    save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})

    class Rounding(Recorder):
        def prepare(self, layer: Layer) -> None:
            for linear in layer.linears.values():
                linear.weight = nn.Parameter((linear.weight * 8).round() / 8, requires_grad=False)

    data = batches(rows([16, 16]))
    rounding, plain = Rounding(), Recorder()
    names = [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]
    run(tmp_path, data, rounding, names)
    run(tmp_path / "changed", data, plain, names)
    for name, statistics in plain.found.items():
        assert torch.equal(rounding.found[name].max, statistics.max), name


@pytest.mark.parametrize("forwards", [1, 2])
def test_a_layer_carries_on_with_the_weights_that_finish_left(forwards: int, tmp_path: Path) -> None:
    """`finish` zeroes the weights: a layer's statistics are of full ones, the next layer's of one that adds nothing."""
    make(tmp_path, "llama")

    class Zeroing(Recorder):
        def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
            super().finish(layer, statistics)
            for linear in layer.linears.values():
                linear.weight = nn.Parameter(torch.zeros_like(linear.weight), requires_grad=False)

    data = batches(rows([16]))
    visitor = Zeroing(second_forward=True)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    skeleton, source = opened(tmp_path)
    sweep(skeleton, source, data, visitor.want(names), forwards=forwards)
    first = visitor.found["model.layers.0.self_attn.q_proj"]
    for i in (1, 2):  # the norms are all ones, so the same hidden states give the same input
        assert torch.equal(visitor.found[f"model.layers.{i}.self_attn.q_proj"].max, first.max)
    assert float(first.max.abs().max()) > 0


def test_layers_behind_the_last_wanted_one_are_not_run(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    visitor = Recorder()
    run(tmp_path, batches(rows([8])), visitor, ["model.layers.1.mlp.down_proj"])
    assert visitor.layers == ["model.layers.0", "model.layers.1"]
    assert set(visitor.found) == {"model.layers.1.mlp.down_proj"}


def test_the_sweep_is_deterministic(tmp_path: Path) -> None:
    make(tmp_path, "mixtral")
    found = []
    for _ in range(2):
        visitor = Recorder()
        run(tmp_path, batches(rows([24, 18, 24, 3]), 48), visitor)
        found.append(visitor.found)
    assert all(torch.equal(found[0][n].max, found[1][n].max) for n in found[0])


# What is refused


def broken(folder: Path, change: Any) -> FileSource:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return FileSource(folder)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    source = FileSource(tmp_path)
    gone = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=gone):
        Skeleton(tmp_path, source.names() - {gone})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.extra\.weight"):
        Skeleton(tmp_path, source.names() | {"model.layers.0.mlp.extra.weight"})
    # Layers that config.json does not count, and frequencies that old checkpoints stored, are nothing unexpected.
    Skeleton(
        tmp_path,
        source.names() | {"model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"},
    )


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    source = broken(tmp_path, lambda t: t.update({name: torch.zeros(8, 8)}))
    skeleton = Skeleton(tmp_path, source.names())
    with pytest.raises(CheckpointError, match=r"up_proj.weight' has shape \[8, 8\]"):
        skeleton.materialize(0, source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_layer_and_batch(value: float, tmp_path: Path) -> None:
    make(tmp_path, "llama")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = value

    broken(tmp_path, spoil)
    with pytest.raises(
        CalibrationError, match=r"model\.layers\.1\.self_attn\.o_proj, calibration samples 0, 1: NaN or Inf"
    ):
        run(tmp_path, batches(rows([8, 8])), Recorder())


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    with pytest.raises(CalibrationError, match="128 is beyond the model's vocabulary of 128"):
        run(tmp_path, batches([[1, 128]]), Recorder())


def test_a_module_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    with pytest.raises(CalibrationError, match=r"layers\.9\.mlp"):
        run(tmp_path, batches([[1]]), Recorder(), ["model.layers.9.mlp.up_proj"])


def test_experts_of_another_layout_are_refused_by_class(tmp_path: Path) -> None:
    class NarrowExperts(nn.Module):
        has_post_expert_norm = True

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(4, 8, 32))
            self.down_proj = nn.Parameter(torch.empty(4, 16, 8))

    with pytest.raises(CheckpointError, match=r"NarrowExperts.*has_post_expert_norm"):
        Experts(NarrowExperts(), ("gate_proj", "up_proj", "down_proj"), "model.layers.0.mlp.experts")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        Skeleton(tmp_path, [])


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model", "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="no_such_model"):
        Skeleton(tmp_path, ["model.layers.0.x.weight"])


# Parts on their own


@pytest.mark.parametrize(("rows_in", "columns", "bias"), [(1, 64, False), (96, 32, True), (65, 40, True)])
def test_packed_linears_compute_the_same(rows_in: int, columns: int, bias: bool) -> None:
    linear = nn.Linear(columns, rows_in, bias=bias, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = [torch.randn(n, 7, columns, dtype=torch.bfloat16) for n in (3, 1, 0)] + [
        torch.randn(33, columns).bfloat16()
    ]
    with torch.no_grad():
        with packed([linear], 21):
            found = [linear(x) for x in inputs]
        assert len(seen) == len(inputs)
        for x, y in zip(inputs, found, strict=True):
            exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
            # One rounding to bf16, of a sum of rounded products.
            torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-9)
        assert "forward" not in linear.__dict__


@pytest.mark.parametrize(("model_type", "norms"), [("llama", 2), ("qwen3", 4), ("gemma3_text", 0), ("deepseek_v3", 4)])
def test_fused_norms_are_the_models(model_type: str, norms: int, tmp_path: Path) -> None:
    """Within bf16's rounding, and nearer to fp32 than the written-out form."""
    make(tmp_path, model_type, torch.bfloat16)
    skeleton, source = opened(tmp_path)
    skeleton.materialize(0, source)
    layer = skeleton.layers[0]
    replaced = 0
    for norm in [m for m in layer.modules() if type(m).__name__.endswith("RMSNorm")]:
        norm.weight.data = (torch.randn(norm.weight.shape) / 4).bfloat16()
        x = 3 * torch.randn(50, *norm.weight.shape).bfloat16()
        with torch.no_grad():
            written = norm(x).float()
            exact = norm.float()(x.float())
            norm.bfloat16()
            with fused(layer):
                replaced += "forward" in norm.__dict__
                found = norm(x).float()
        assert "forward" not in norm.__dict__
        assert (found - exact).abs().mean() <= (written - exact).abs().mean()
    assert replaced == norms


@pytest.mark.parametrize("model_type", ["qwen2", "qwen2_moe"])
def test_bf16_statistics_are_near_those_of_fp32(model_type: str, tmp_path: Path) -> None:
    """The whole bf16 path (blockwise attention, packed Linears) on several batches; bf16 rounds in every layer."""
    make(tmp_path, model_type, torch.bfloat16)
    data = batches(rows([32] * 4), 32)
    skeleton, source = opened(tmp_path)
    visitor = Recorder()
    names = [name for name in modules_of(skeleton, source) if ".experts." not in name]
    sweep(skeleton, source, data, visitor.want(names))
    expected = input_ranges(tmp_path, data)
    for name, statistics in visitor.found.items():
        exact = torch.maximum(expected[name][0].abs(), expected[name][1].abs()).max()
        assert float((statistics.tensor_absmax - exact).abs()) <= 0.1 * float(exact), name


def test_batches_hold_every_row_once_within_the_limit() -> None:
    tokens = rows([5, 100, 7, 100, 300, 6, 99])
    grouped = batches(tokens, 256, pad_id=3)
    back = []
    for batch in grouped:
        assert batch.input_ids.numel() <= 256 or batch.input_ids.shape[0] == 1
        for i, row in enumerate(batch.input_ids):
            back.append(row.tolist() if batch.mask is None else row[batch.mask[i].bool()].tolist())
    assert sorted(back) == sorted(tokens)
    assert sum(batch.tokens for batch in grouped) == sum(map(len, tokens))
    with pytest.raises(CalibrationError, match="no rows"):
        batches([])


def test_statistics_merge_like_one_pass() -> None:
    x = torch.randn(50, 6)
    parts = [Statistics.of(part, "x") for part in x.split([20, 1, 29])]
    merged = parts[0].copy()
    for part in parts[1:]:
        merged.merge(part)
    assert merged.count == 50
    assert torch.equal(merged.min, x.amin(0)) and torch.equal(merged.max, x.amax(0))
    assert torch.equal(merged.absmax, x.abs().amax(0))
    assert torch.equal(merged.tensor_absmax, x.abs().max().reshape(1, 1))
    assert torch.equal(merged.tensor_min, x.min().reshape(1, 1))
    assert torch.equal(merged.tensor_max, x.max().reshape(1, 1))
    assert torch.equal(parts[0].max, x[:20].amax(0))


def test_gram_and_sums_follow_a_smoothing_in_closed_form() -> None:
    x, s = torch.randn(50, 6), torch.rand(6) + 0.5
    wanted = Statistics.of(x / s, "x", Wants(gram=True))
    found = Statistics.of(x, "x", Wants(gram=True))
    found.divide(s)
    for name in ("min", "max", "absum", "gram"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    parts = [Statistics.of(part, "x", Wants(gram=True)) for part in x.split([20, 1, 29])]
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert parts[0].gram is not None and parts[0].absum is not None
    torch.testing.assert_close(parts[0].gram, x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts[0].absum, x.abs().sum(0), rtol=1e-5, atol=0)
