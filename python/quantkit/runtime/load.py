"""`quantkit.load`: a quantized checkpoint as a Transformers model whose quantized Linears are `QuantLinear`s.

The model is built on the meta device and filled module by module: codes go from the mapped file straight into a
kernel's layout, the rest is copied in the model's dtype, and pages are let go of as they were read. So the most that
is in memory is the model as it stays, and one Linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..checkpoint.hub import resolve_model
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, ConfigError
from ..formats.source import WeightSource
from ..formats.stacked_source import split
from ..live_hooks import CacheQuantizer
from ..models.attention import round_queries
from ..models.experts import Expert, Experts
from ..models.fused_block import fuse_blocks
from ..models.fused_norm import replace_norms
from ..models.skeleton import Skeleton
from .check import check_device, check_tensors, require_quantized
from .experts import quant_experts, suits
from .head import Embedding, Head, PlainHead
from .linear import Parts, QuantLinear, merged, quant_linear
from .saving import Saver, Stored

GENERATION = "generation_config.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    merge: bool = True,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Any:
    """The model in folder `path` (or of that hub id) as Transformers' causal language model; `generate` and all else of
    it works. Its quantized Linears run on quantkit's kernels; weights are never expanded.

    `path`: a checkpoint in compressed-tensors' int-, float-, naive-, pack-, mxfp8-, mxfp4- or nvfp4-quantized format,
    as quantkit and llm-compressor write them, or of quant_method fp8, gptq or awq. `dtype` (fp32, fp16, bf16;
    config.json's unless given) is that of all that is not quantized, and of activations between Linears.
    `attn_implementation`: as Transformers takes it ("sdpa", "eager"), or "quantkit_sage"
    (`quantkit.register_attention`); without one, quantkit's own for the CPU where the architecture allows
    (`ops.attention` in bf16). With a `kv_cache_scheme` the cache holds what its codes can. `merge`: Linears that read
    one input (q, k and v; gate and up) are computed together; the results are the same. `cache_dir` and `revision` are
    for hub ids; `trust_remote_code` runs modelling code that the folder brings along.

    Raises CheckpointError, naming the tensor, for a checkpoint that is not quantized, has tensors missing, left over or
    of a wrong shape, or a scheme without a kernel; ConfigError for a device without kernels.
    """
    check_device(device)
    folder = resolve_model(path, cache_dir, revision)
    skeleton = load_skeleton(
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        merge=merge,
        trust_remote_code=trust_remote_code,
    )
    return skeleton.model


def load_skeleton(
    folder: Path,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    merge: bool = True,
    trust_remote_code: bool = False,
) -> FilledSkeleton:
    """What `load` does, for the engine: the skeleton around the model."""
    dtype = _dtype(dtype)
    with split(Checkpoint(folder)) as checkpoint:
        require_quantized(checkpoint)
        source = WeightSource(checkpoint)
        check_tensors(source)
        skeleton = FilledSkeleton(folder, source.names(), dtype=dtype, trust_remote_code=trust_remote_code)
        _Filler(skeleton, source, merge).fill()
    _configure(skeleton, folder, attn_implementation)
    return skeleton


class FilledSkeleton(Skeleton):
    """A skeleton whose model is filled once, and stays so."""

    def materialize(self, index: int, source: Any) -> None:
        """Nothing to fill: the layer is there."""

    def drop(self, index: int, source: Any) -> None:
        """Nothing to drop: the model is in use."""

    @contextmanager
    def outer(self, source: Any, *, head: bool) -> Iterator[None]:
        """All of the model is there."""
        yield


class _Copies:
    """A source of the plain weights of a checkpoint: in memory of their own, pages of the file let go of."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source

    def get(self, name: str) -> Tensor:
        tensor = self.source.get(name).clone()
        self.source.release(name)
        return tensor


class _Filler:
    """Fills the model of `skeleton` from `source`."""

    def __init__(self, skeleton: Skeleton, source: WeightSource, merge: bool) -> None:
        self.skeleton, self.source, self.plain, self.merge = skeleton, source, _Copies(source), merge
        self.model, self.stored = skeleton.model, Stored(skeleton.folder)

    def fill(self) -> None:
        tied = self.skeleton.tied_head
        self._pack_head(tied)
        head = self.model.get_output_embeddings()
        linears = {}
        for path, module in list(self.model.named_modules()):
            name = self.skeleton.checkpoint_name(path)
            if isinstance(module, nn.Linear) and name in self.source.modules:
                linears[name] = (path, module)
            elif not (type(module) is nn.Linear and module is head and tied):
                self.skeleton.fill(path, module, self.plain, recurse=False)
        left = sorted(self.source.modules - linears.keys())
        if left:
            raise CheckpointError(
                f"{self.skeleton.folder}: '{left[0]}' is quantized, but {type(self.model).__name__} has no Linear of "
                "that name; config.json does not describe this checkpoint"
            )
        if type(head) is nn.Linear:
            if tied:
                head.weight = self.model.get_input_embeddings().weight
            self.model.set_output_embeddings(PlainHead(head).train(head.training))
        if self.merge:
            self._put_experts(linears)
        sets = self.skeleton.family.fused_sets(linears) if self.merge else []
        sets += [(name,) for name in linears.keys() - {name for names in sets for name in names}]
        replace_norms(self.model)
        fuse_blocks(self.model)
        for attention in self.source.cache_quantizers:
            self._quantize_cache(attention)
        for names in sets:
            self._put(
                {name: linears[name][0] for name in names}, [self.parts(name, linears[name][1]) for name in names]
            )
            for name in names:
                self.source.release(f"{name}.weight")

    def _pack_head(self, tied: bool) -> None:
        """A head of bf16 numbers, and the embedding that is the same matrix, packed from the file."""
        path = self.skeleton.head_path
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        plain = type(head) is nn.Linear and self.skeleton.checkpoint_name(path) not in self.source.modules
        if not plain or self.skeleton.dtype != torch.bfloat16:
            return
        packed = ops.pack_bf16(self.skeleton.read(f"{path}.weight", head.weight, self.source))
        self.source.release(self.skeleton.source_name(f"{path}.weight"))
        self.model.set_output_embeddings(Head(packed, head).train(head.training))
        if tied and type(embedding) is nn.Embedding:
            self.model.set_input_embeddings(Embedding(packed, embedding).train(embedding.training))

    def _quantize_cache(self, attention: str) -> None:
        """From now on the cache of this attention module holds what its codes can."""
        paths = [p for p, _ in self.model.named_modules() if self.skeleton.checkpoint_name(p) == attention]
        if not paths:
            raise CheckpointError(
                f"{self.skeleton.folder}: '{self.source.cache_names(attention)[0]}' belongs to no module of "
                f"{type(self.model).__name__}"
            )
        keys, values = self.source.cache_scales(attention)
        for name, scale in zip(self.source.cache_names(attention)[:2], (keys, values), strict=True):
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise CheckpointError(f"{self.skeleton.folder}: tensor '{name}' is not finite and positive")
        assert self.source.kv_cache is not None
        hook = CacheQuantizer(self.source.kv_cache, keys, values, self.source.cache_quantizers[attention])
        module = self.model.get_submodule(paths[0])
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if attention in self.source.query_quantizers:
            round_queries(self.model, module, self.source.query_quantizers[attention])

    def _put_experts(self, linears: dict[str, tuple[str, nn.Linear]]) -> None:
        """QuantExperts in the place of experts that are quantized in one way; their Linears leave `linears`."""
        for path, experts in list(self.model.named_modules()):
            if not isinstance(experts, Experts):
                continue
            prefix = self.skeleton.checkpoint_name(path)
            expert = experts[0]
            assert isinstance(expert, Expert)
            names = [[f"{prefix}.{i}.{part}" for part in expert.parts] for i in range(len(experts))]
            if not suits(self.source, names):
                continue
            known = {name: linears.pop(name)[1] for row in names for name in row}
            module = quant_experts(
                experts,
                partial(self._of_expert, prefix, known),
                partial(self._release, names),
            )
            module.stored = partial(self._of_experts, prefix, names)
            self.model.set_submodule(path, module.eval())

    def _of_expert(self, prefix: str, linears: dict[str, nn.Linear], index: int, part: str) -> Parts:
        name = f"{prefix}.{index}.{part}"
        return self.parts(name, linears[name])

    def _release(self, names: list[list[str]], index: int) -> None:
        for name in names[index]:
            self.source.release(f"{name}.weight")

    def _of_experts(self, prefix: str, names: list[list[str]]) -> dict[str, Tensor]:
        return {
            f"{name.removeprefix(prefix)[1:]}.{part}": tensor
            for row in names
            for name in row
            for part, tensor in self.stored.tensors(name).items()
        }

    def _put(self, paths: dict[str, str], parts: list[Parts]) -> None:
        """QuantLinears in the place of Linears that read one input (name -> path): one for all where that works."""
        modules: Sequence[QuantLinear] = merged(parts) or [quant_linear(p) for p in parts]
        for (name, path), module in zip(paths.items(), modules, strict=True):
            module.stored = partial(self.stored.tensors, name)
            self.model.set_submodule(path, module.eval())

    def parts(self, name: str, linear: nn.Linear) -> Parts:
        """What the QuantLinear in the place of `linear` is made from."""
        source, checkpoint = self.source, self.source.checkpoint
        shape = source.shape(name)
        if shape != (linear.out_features, linear.in_features):
            raise CheckpointError(
                f"{self.skeleton.folder}: the weight of '{name}' has shape {list(shape)}, "
                f"{type(self.model).__name__} with this config.json needs {[linear.out_features, linear.in_features]}"
            )
        weight, inputs = source.sound(name), source.schemes[name].input_activations
        static = inputs is not None and not inputs.dynamic
        part = "input_global_scale" if inputs is not None and inputs.dynamic == "local" else "input_scale"
        scale = None
        if static or part == "input_global_scale":
            scale = checkpoint.tensor(f"{name}.{part}").float().reshape(1)
        zero_point = None
        if static and inputs is not None and not inputs.symmetric:
            zero_point = source.zero_point(name).reshape(1)
        bias = None
        if linear.bias is not None:
            bias = self.plain.get(f"{name}.bias").to(self.skeleton.dtype)
        return Parts(weight, inputs, scale, zero_point, bias)


def _configure(skeleton: Skeleton, folder: Path, attn_implementation: str | None) -> None:
    """What `from_pretrained` sets beside weights."""
    from transformers import GenerationConfig

    from .attention import register_attention

    register_attention()
    model = skeleton.model
    model._quantkit = Saver(model, skeleton, Stored(folder))  # tells that it is quantized
    model.save_pretrained = model._quantkit.save_pretrained
    hooks = (hook for m in model.modules() for hook in m._forward_pre_hooks.values())
    codes = any(isinstance(hook, CacheQuantizer) and hook.has_codes for hook in hooks)
    model._prepare_cache_for_generation = partial(_prepare_cache, model, codes)
    if attn_implementation is not None:
        if any(hasattr(module, "quantize_query") for module in model.modules()):
            raise ConfigError("attn_implementation: the checkpoint quantizes queries, which only the default does")
        try:
            model.set_attn_implementation(attn_implementation)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"attn_implementation: '{attn_implementation}': {str(error).strip()}") from error
    if (folder / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.name_or_path = str(folder)


def _prepare_cache(
    model: Any, codes: bool, config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int
) -> None:
    """Transformers' hook of `generate`: without a cache from the caller, or the wish for another kind, codes are cached
    where the checkpoint has scales for them, and numbers in a cache that grows without copies.
    """
    from transformers.cache_utils import DynamicCache

    from .cache import QuantizedCache
    from .growing import growing

    ours = config.use_cache and config.cache_implementation in (None, "dynamic")
    ours = ours and model_kwargs.get("past_key_values") is None
    if ours and codes:
        model_kwargs["past_key_values"] = QuantizedCache.of(model, capacity=max(1, length))
        config.cache_implementation = None
    type(model)._prepare_cache_for_generation(model, config, model_kwargs, mode, batch, length)
    if ours and type(model_kwargs.get("past_key_values")) is DynamicCache:
        growing(model_kwargs["past_key_values"])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found in (None, "auto"):
        return None
    if found not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ConfigError(f"dtype: {dtype!r} is not one of {names}")
    assert isinstance(found, torch.dtype)
    return found
