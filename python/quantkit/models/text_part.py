"""A causal language model of Transformers' text model, where Transformers has that model alone: the text part of some
vision-language models (Qwen-VL, GLM-V), which it knows as a decoder and not as a model with a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from torch import nn


def text_model(config: Any, **options: Any) -> Any:
    """The model of a decoder's `config`, made with `options` of `from_config`. ValueError if Transformers has none."""
    from transformers import AutoModel, PreTrainedModel

    decoder: Any = AutoModel
    found = decoder._model_mapping.get(type(config), None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(f"it has neither a causal language model nor a decoder for {type(config).__name__}")
    kind: Any = found
    return _with_head(kind)._from_config(config, **options)


@cache
def _with_head(decoder: Any) -> Any:
    """The class of `decoder`, a class of Transformers, with a head."""
    from transformers import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    # Its own base knows what is initialized how, and which attentions there are.
    class TextForCausalLM(decoder.__bases__[0], GenerationMixin):  # type: ignore[misc]
        base_model_prefix = "model"
        _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, *, logits_to_keep: int = 0, **inputs: Any) -> Any:
            """As that of Transformers' own causal language models, all but the first argument by name."""
            out = self.model(input_ids, **inputs)
            hidden = out.last_hidden_state
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    TextForCausalLM.__name__ = f"{decoder.__name__}ForCausalLM"
    return TextForCausalLM
