"""A model in memory as a checkpoint: the names, shapes and values of its file, in its own memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.calibration.batches import batches
from quantkit.calibration.forward import embed, forward
from quantkit.checkpoint.reader import Checkpoint
from quantkit.models.experts import Experts
from quantkit.models.live import LiveCheckpoint
from quantkit.models.skeleton import Skeleton

from .tiny import CONFIGS, make

IDS = torch.arange(64).reshape(2, 32)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_model_looks_like_its_file(model_type: str, tmp_path: Path) -> None:
    model = make(tmp_path, model_type, torch.bfloat16)
    live = LiveCheckpoint(model)
    with Checkpoint(tmp_path) as file:
        assert list(live.tensors) == sorted(file.tensors)
        for name, info in file.tensors.items():
            found = live.tensors[name]
            assert (found.dtype, found.shape, found.nbytes) == (info.dtype, info.shape, info.nbytes), name
            assert torch.equal(live.get(name), file.tensor(name)), name
        assert live.total_bytes == file.total_bytes
        same = {k: v for k, v in file.config.items() if k not in ("use_cache", "transformers_version")}
        assert {k: live.config[k] for k in same} == same
    spans = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in (*model.parameters(), *model.buffers())]
    for name in live.names():
        begin = live.get(name).data_ptr()
        assert any(low <= begin < high for low, high in spans), f"{name} is a copy"


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_its_skeleton_computes_the_same(model_type: str, tmp_path: Path) -> None:
    model = make(tmp_path, model_type)
    live = LiveCheckpoint(model)
    skeleton = Skeleton(live.folder, live.names(), like=model)
    data = batches(IDS.tolist(), 64)
    with torch.no_grad():
        hidden, calls = embed(skeleton, live, data)
        for index in range(skeleton.num_layers):
            skeleton.materialize(index, live)
            forward(skeleton, index, data, calls, hidden)
            skeleton.drop(index, live)
        with skeleton.outer(live, head=True):
            streamed = skeleton.head(hidden.view(0))
        expected = model(input_ids=IDS).logits
    # Attention is another implementation, so sums are in another order.
    assert torch.allclose(streamed, expected, rtol=1e-3, atol=1e-3)
    assert all(not p.is_meta for p in model.parameters())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_become_linears_on_the_same_memory(model_type: str, tmp_path: Path) -> None:
    model = make(tmp_path, model_type).eval()
    live = LiveCheckpoint(model)
    fused = {path: module for path, module in live.fused.items()}
    assert fused
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        live.unfuse()
        assert torch.allclose(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
        name = next(n for n in live.names() if ".experts.1." in n)
        live.put(name, torch.zeros(live.tensors[name].shape))
        module = live.module(name.removesuffix(".weight"))
        assert isinstance(module, torch.nn.Linear)
        assert not module.weight.any()
        assert not torch.allclose(model(input_ids=IDS).logits, before)
    for path, old in fused.items():
        assert isinstance(model.get_submodule(path), Experts)
        views = {p.untyped_storage().data_ptr() for p in model.get_submodule(path).parameters()}
        assert views == {p.untyped_storage().data_ptr() for p in old.parameters()}
