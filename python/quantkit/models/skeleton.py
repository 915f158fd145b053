"""A Transformers model whose weights are not there: built on the meta device, one decoder layer filled at a time.

The forward pass is Transformers' own. What it hands to each decoder layer (masks, position embeddings, ...) is
recorded by running the whole model with layers that only take notes, so nothing about an architecture is repeated here.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from . import attention
from .experts import Experts
from .experts_layout import give_routes, is_fused
from .families import Family, family_of

# Buffers that old checkpoints carry and that every model computes itself.
COMPUTED = (r"rotary_emb\.inv_freq$", r"\.masked_bias$")


class WeightSource(Protocol):
    """Where weights come from: a plain checkpoint, or a quantized one that is dequantized on the way.

    A source may also have `release(name)`; it is called for what a part of the model was filled with once that part is
    dropped, so that mapped files leave the resident set.
    """

    def get(self, name: str) -> Tensor:
        """The tensor with this checkpoint name. The skeleton only reads it."""
        ...


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to a decoder layer besides hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Skeleton:
    """The model of `folder`'s config.json, for a checkpoint with tensors `names`. With `like`, a model in memory, its
    config and class are taken, and `folder` only names it in errors.

    Every parameter is on the meta device until `materialize` (a layer) or `outer` (the rest) fills it from a source;
    floating-point ones are converted to `dtype`, the checkpoint's own unless given. Raises CheckpointError
    naming tensors that the model needs and the checkpoint lacks, or that no part of the model takes.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Collection[str],
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        like: Any = None,
    ) -> None:
        self.folder = Path(folder)
        if like is None:
            config, raw = _read_config(self.folder, trust_remote_code)
        else:
            config, raw = plain_config(like.config), like.config.to_dict()
            dtype = dtype or like.dtype
        self.family: Family = family_of(raw)
        self.names = frozenset(names)
        self.root = self.family.root(self.names)
        if "shared" in (getattr(config, "indexer_types", None) or ()):
            raise CheckpointError(
                f"{self.folder}: indexer_types: some layers attend to what a layer before them has chosen; quantkit "
                "calibrates models whose layers give each other hidden states alone; recipes without data do not run it"
            )
        make = _auto(trust_remote_code) if like is None else type(like)._from_config
        self.model = _build(make, config, self.family, dtype, self.folder)
        self.dtype: torch.dtype = self.model.dtype
        self.base: Any = base_of(self.model)
        self.layers: nn.ModuleList = self.base.get_submodule(self.family.layers)
        self.num_layers = len(self.layers)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self._tail: tuple[None, ...] | None = None  # what a layer returns behind the hidden states, if a tuple
        self._fp32 = [re.compile(p) for p in getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()]
        self._layers_path = next(n for n, m in self.model.named_modules() if m is self.layers)
        head = self.model.get_output_embeddings()
        self.head_path = next((n for n, m in self.model.named_modules() if m is head), "lm_head")
        self._base_path = self._layers_path.removesuffix(self.family.layers)
        self.experts: list[list[Experts]] = [self._split_experts(i) for i in range(self.num_layers)]
        self._materialize_buffers()
        self._check_names()

    # Names

    def checkpoint_name(self, name: str) -> str:
        """The checkpoint's name of a parameter or module of the model."""
        for here, there in self.family.renames:
            name = name.replace(here, there)
        if name.startswith(self._base_path) and self._base_path:
            return self.root + name[len(self._base_path) :]
        if self._in_head(name):
            for head in self.family.heads:
                if f"{head}.weight" in self.names:
                    return head + name.removeprefix(self.head_path)
        return name

    @property
    def tied_head(self) -> bool:
        """Whether the head is the embedding, and has no tensor of its own."""
        weight = f"{self.head_path}.weight"
        return self.source_name(weight) != self.checkpoint_name(weight)

    def layer_prefix(self, index: int) -> str:
        """The checkpoint's name of a decoder layer."""
        return self.checkpoint_name(f"{self._layers_path}.{index}")

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The layer's Linears by their checkpoint names, in the model's order."""
        path = f"{self._layers_path}.{index}"
        return {
            self.checkpoint_name(f"{path}.{name}"): module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def module(self, index: int, name: str) -> nn.Module:
        """The module of layer `index` whose checkpoint name is `name`."""
        path = f"{self._layers_path}.{index}"
        modules = self.layers[index].named_modules()
        return next(module for inner, module in modules if self.checkpoint_name(f"{path}.{inner}") == name)

    def stored(self, index: int) -> dict[str, tuple[nn.Module, str]]:
        """Every parameter and persistent buffer of the layer by its checkpoint name: (module, attribute)."""
        path = f"{self._layers_path}.{index}"
        return {
            self.checkpoint_name(".".join(part for part in (path, name, key) if part)): (module, key)
            for name, module in self.layers[index].named_modules()
            for key in _stored(module)
        }

    # Weights

    def materialize(self, index: int, source: WeightSource) -> None:
        """Fill decoder layer `index` from `source`."""
        self.fill(f"{self._layers_path}.{index}", self.layers[index], source)

    def materialize_without_experts(self, index: int, source: WeightSource) -> None:
        """Fill decoder layer `index` but for its experts from `source`."""
        within = {module for group in self.experts[index] for module in group.modules()}
        self.fill(f"{self._layers_path}.{index}", self.layers[index], source, skip=within)

    def prefetch(self, index: int, source: WeightSource, *, experts: int | None = None) -> None:
        """Start reading decoder layer `index` from disk, if `source` can; of its experts the first few, or all."""
        prefetch = getattr(source, "prefetch", None)
        if prefetch is None:
            return
        late: set[nn.Module] = set()
        if experts is not None:
            late = {m for group in self.experts[index] for e in list(group)[experts:] for m in e.modules()}
        path = f"{self._layers_path}.{index}"
        for name, module in self.layers[index].named_modules():
            for key in () if module in late else _stored(module):
                prefetch(self.source_name(".".join(part for part in (path, name, key) if part)))

    def prefetch_experts(self, experts: Experts, members: Sequence[int], source: WeightSource) -> None:
        """Start reading some experts of a layer from disk, if `source` can."""
        prefetch = getattr(source, "prefetch", None)
        if prefetch is None:
            return
        for name, module in self._of(experts, members):
            for key in _stored(module):
                prefetch(self.source_name(f"{name}.{key}"))

    def materialize_experts(self, experts: Experts, members: Sequence[int], source: WeightSource) -> None:
        """Fill some experts of a layer from `source`."""
        for name, module in self._of(experts, members):
            self.fill(name, module, source, recurse=False)

    def drop_experts(self, experts: Experts, members: Sequence[int], source: WeightSource) -> None:
        """Return some experts of a layer to the meta device."""
        for name, module in self._of(experts, members):
            _to_meta(module, recurse=False)
            self._release(name, module, source, recurse=False)

    def _of(self, experts: Experts, members: Sequence[int]) -> Iterator[tuple[str, nn.Module]]:
        for i in members:
            for name, module in experts[i].named_modules():
                yield f"{experts.path}.{i}.{name}" if name else f"{experts.path}.{i}", module

    def drop(self, index: int, source: WeightSource) -> None:
        """Return decoder layer `index` to the meta device."""
        _to_meta(self.layers[index])
        self._release(f"{self._layers_path}.{index}", self.layers[index], source)

    @contextmanager
    def outer(self, source: WeightSource, *, head: bool) -> Iterator[None]:
        """What lies outside the decoder layers, filled within the block: embeddings and final norm, and the head
        if asked for.
        """
        modules = [(name, m) for name, m in self.model.named_modules() if not self._in_layers(name)]
        if not head:
            modules = [(name, m) for name, m in modules if not self._in_head(name)]
        try:
            for name, module in modules:
                self.fill(name, module, source, recurse=False)
            yield
        finally:
            for name, module in modules:
                _to_meta(module, recurse=False)
                self._release(name, module, source, recurse=False)

    # Forward

    def capture(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
        """Embed `input_ids` [rows, tokens]: hidden states that enter the first layer, and every layer's call.
        Needs `outer`. `attention_mask` [rows, tokens] is 1 for real tokens, None if all are.
        """
        calls: list[LayerCall] = []
        entered: list[Tensor] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden_states)
            calls.append(LayerCall(args, kwargs))
            return self._result(hidden_states)

        def run() -> Tensor:
            calls.clear()
            entered.clear()
            with self._stubbed(record), torch.no_grad():
                out = self.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            last: Tensor = out.last_hidden_state
            return last

        self._returned(run, entered)
        if len(calls) != self.num_layers:
            raise CheckpointError(
                f"{type(self.model).__name__}: its forward calls {len(calls)} of {self.num_layers} decoder layers; "
                "quantkit runs models whose decoder layers follow one another"
            )
        return entered[0], calls

    def forward(self, index: int, hidden: Tensor, call: LayerCall, cache: Any = None) -> Tensor:
        """Decoder layer `index` applied to `hidden` [rows, tokens, hidden size]; its keys and values go through `cache`
        if there is one.
        """
        kwargs = call.kwargs if cache is None else {**call.kwargs, "past_key_values": cache}
        out = self.layers[index](hidden, *call.args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [rows, tokens, vocabulary] of the last layer's output: final norm, head, and whatever the model does
        to logits. Needs `outer(head=True)`.
        """
        with self._stubbed(lambda hidden_states, *args, **kwargs: self._result(hidden)), torch.no_grad():
            logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return logits

    def _result(self, hidden: Tensor) -> Any:
        return hidden if self._tail is None else (hidden, *self._tail)

    def _returned(self, run: Callable[[], Tensor], entered: Sequence[Tensor]) -> None:
        """`run`, with layers that return what this model takes: hidden states, or a tuple that begins so."""
        failed: Exception | None = None
        for tail in dict.fromkeys((self._tail, None, (), (None,))):
            self._tail = tail
            try:
                last = run()
            except (
                TypeError,
                ValueError,
                IndexError,
                RuntimeError,
            ) as error:  # it takes apart what layers do not return
                failed = failed or error
                continue
            if entered and all(hidden.shape == entered[0].shape for hidden in (*entered, last)):
                return
        why = f" ({failed})" if failed else ""
        raise CheckpointError(
            f"{type(self.model).__name__}: its decoder layers hand more to one another than hidden states{why}; "
            "quantkit calibrates models whose layers follow one another; recipes without data do not run it"
        )

    @contextmanager
    def _stubbed(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Every decoder layer's forward replaced, its attributes (which the model may look at) kept."""
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    # Construction

    def _in_head(self, name: str) -> bool:
        return name == self.head_path or name.startswith(self.head_path + ".")

    def _in_layers(self, name: str) -> bool:
        return name == self._layers_path or name.startswith(self._layers_path + ".")

    def _split_experts(self, index: int) -> list[Experts]:
        """Replace fused experts by one Linear per projection, unless the checkpoint stores them fused as well."""
        split = []
        layer = self.layers[index]
        for name, module in list(layer.named_modules()):
            if not is_fused(module):
                continue
            path = f"{self._layers_path}.{index}.{name}"
            if self.checkpoint_name(f"{path}.down_proj") in self.names:
                continue
            experts = Experts(module, self.family.expert_parts, self.checkpoint_name(path), path)
            give_routes(layer.get_submodule(name.rpartition(".")[0]), module, self.checkpoint_name(path))
            layer.set_submodule(name, experts)
            split.append(experts)
        return split

    def _materialize_buffers(self) -> None:
        """Non-persistent buffers (rotary frequencies, embedding scales) are in no checkpoint: the model computes them.

        Transformers' contract for models built on meta is that `_init_weights` sets them. NaN shows what it missed.
        """
        for name, module in self.model.named_modules():
            buffers = {k: b for k, b in module._buffers.items() if k in module._non_persistent_buffers_set}
            buffers = {k: b for k, b in buffers.items() if b is not None and b.is_meta}
            if not buffers:
                continue
            for key, buffer in buffers.items():
                fill = float("nan") if buffer.is_floating_point() else 0
                module._buffers[key] = torch.full(buffer.shape, fill, dtype=buffer.dtype)
            with torch.no_grad():
                self.model._init_weights(module)
            for key in buffers:
                value = module._buffers[key]
                assert value is not None
                if value.is_floating_point() and bool(value.isnan().any()):
                    raise CheckpointError(
                        f"{type(self.model).__name__}: buffer '{name}.{key}' of class {type(module).__name__} is not "
                        "set by the model's _init_weights, so it cannot be computed without loading the whole model"
                    )

    def _tensors(self) -> Iterator[tuple[str, str]]:
        """(name in the model, name in the checkpoint) of everything a checkpoint has to hold."""
        for name, module in self.model.named_modules():
            for key in _stored(module):
                path = f"{name}.{key}" if name else key
                yield path, self.source_name(path)

    def source_name(self, path: str) -> str:
        """The checkpoint name to read `path` from: a tied head without a tensor of its own is the embedding."""
        name = self.checkpoint_name(path)
        if name not in self.names and path == f"{self.head_path}.weight" and self.family.tied:
            return f"{self.root}{self.family.embedding}.weight"
        return name

    def _check_names(self) -> None:
        wanted = {there for _, there in self._tensors()}
        missing = sorted(wanted - self.names)
        if missing:
            raise CheckpointError(
                f"{self.folder}: {type(self.model).__name__} needs {_list(missing)}, which the checkpoint lacks"
            )
        allowed = re.compile(
            "|".join((*COMPUTED, *(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())))
        )
        unexpected = sorted(
            name
            for name in self.names - wanted
            if self.family.layer_of(name) is not None and allowed.search(name) is None
        )
        if unexpected:
            raise CheckpointError(
                f"{self.folder}: {_list(unexpected)} in the checkpoint, but no part of {type(self.model).__name__} "
                "takes it; config.json does not describe this checkpoint"
            )

    def fill(
        self,
        path: str,
        root: nn.Module,
        source: WeightSource,
        *,
        recurse: bool = True,
        skip: Collection[nn.Module] = (),
    ) -> None:
        """Fill `root`, the model's module at `path`, from `source`; without `recurse` only what it holds itself, and
        never what modules in `skip` hold.
        """
        for name, module in list(root.named_modules()) if recurse else [("", root)]:
            for key, old in () if module in skip else _stored(module).items():
                tensor = self.read(".".join(part for part in (path, name, key) if part), old, source)
                if key in module._parameters:
                    module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
                else:
                    module._buffers[key] = tensor

    def read(self, path: str, old: Tensor, source: WeightSource) -> Tensor:
        """What belongs in the place of the model's tensor `old` at `path`, in its dtype."""
        there = self.source_name(path)
        try:
            tensor = source.get(there)
        except KeyError:
            raise CheckpointError(f"{self.folder}: tensor '{there}' is missing") from None
        if tensor.shape != old.shape:
            raise CheckpointError(
                f"{self.folder}: tensor '{there}' has shape {list(tensor.shape)}, {type(self.model).__name__} "
                f"with this config.json needs {list(old.shape)}"
            )
        if tensor.is_floating_point():
            keep = any(p.search(path) for p in self._fp32)
            tensor = tensor.to(torch.float32 if keep else self.dtype)
        return tensor

    def _release(self, path: str, root: nn.Module, source: WeightSource, *, recurse: bool = True) -> None:
        """Tell `source` that what `root` was filled with is no longer needed."""
        release = getattr(source, "release", None)
        if release is None:
            return
        for name, module in root.named_modules() if recurse else [("", root)]:
            for key in _stored(module):
                release(self.source_name(".".join(part for part in (path, name, key) if part)))


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors that are in a checkpoint: parameters and persistent buffers."""
    tensors: dict[str, Tensor] = {k: p for k, p in module._parameters.items() if p is not None}
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            tensors[key] = buffer
    return tensors


def _to_meta(root: nn.Module, *, recurse: bool = True) -> None:
    for module in root.modules() if recurse else [root]:
        for key, tensor in _stored(module).items():
            if tensor.is_meta:
                continue
            empty = torch.empty_like(tensor, device="meta")
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(empty, requires_grad=False)
            else:
                module._buffers[key] = empty


def _list(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """Transformers' config of the decoder, and config.json as a dict."""
    import json

    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; the model folder has to be one that Transformers can load") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {str(error).strip()}") from error
    return plain_config(config), raw


def bare_model(folder: Path, trust_remote_code: bool) -> Any:
    """The model of `folder`'s config.json without weights, as a Skeleton has it."""
    config, raw = _read_config(folder, trust_remote_code)
    return _build(_auto(trust_remote_code), config, family_of(raw), None, folder)


def base_of(model: Any) -> Any:
    """The decoder within a causal language `model`: `model`, where Transformers' own name for it leads nowhere."""
    base = model.base_model
    return model.model if base is model else base


def plain_config(config: Any) -> Any:
    """A copy of Transformers' `config` of the decoder, for a forward with plain weights."""
    config = copy.deepcopy(config.get_text_config())
    # The weights this model gets are plain ones, whatever they are stored as.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Router logits are a training matter; collecting them would keep every layer's.
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    return config


def _auto(trust_remote_code: bool) -> Callable[..., Any]:
    """Transformers' own way from a config to a causal language model; a head on its decoder where it has no such."""
    from transformers import AutoModelForCausalLM

    from .text_part import text_model

    models: Any = AutoModelForCausalLM

    def make(config: Any, **options: Any) -> Any:
        if type(config) not in models._model_mapping and not hasattr(config, "auto_map"):
            return text_model(config, **options)
        return models.from_config(config, trust_remote_code=trust_remote_code, **options)

    return make


def _asks_for_attention(kind: type) -> bool:
    """Whether a model does other things under other attentions, by their names: those with sparse attention mask what
    their indexer leaves out for Transformers' own alone.
    """
    try:
        code = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):  # not there to be read
        return False
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", code) is not None


def _build(make: Callable[..., Any], config: Any, family: Family, dtype: torch.dtype | None, folder: Path) -> Any:
    dtype = dtype or config.dtype or torch.float32

    def build(implementation: str) -> Any:
        with torch.device("meta"):
            return make(config, dtype=dtype, attn_implementation=implementation)

    try:
        if family.attention != "sdpa":
            model = build(family.attention)
        else:
            try:
                model = build(attention.register())
            except KeyError:  # a class that knows its kinds of attention by name
                model = build("eager")
            if not getattr(model, "_supports_sdpa", False) or _asks_for_attention(type(model)):
                model = build("eager")
    except (ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: Transformers cannot build model_type '{family.model_type}': {str(error).strip()}"
        ) from error
    return model.eval()
