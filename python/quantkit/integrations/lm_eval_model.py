"""A `Scorer` as lm-eval's language model (0.4.13). Imported by `quantkit.tasks` alone, where lm-eval is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from ..errors import ConfigError
from ..scoring import Scorer

GENERATED = 256  # tokens, where a task does not say


class ScoredLM(TemplateLM):
    """Tokenizes as lm-eval's own Transformers model does, and asks `scorer` for the rest."""

    def __init__(self, scorer: Scorer, tokenizer: Any, add_bos_token: bool | None = None) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self.scorer, self.add_bos_token = scorer, add_bos_token
        self.max_length = scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """The token between texts."""
        token = self.tokenizer.eos_token_id
        if token is None:
            raise ConfigError("the model's tokenizer has no eos_token, which separates texts in tasks")
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special ones as the tokenizer adds them unless told otherwise, and no second one in front."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            special = False
        options: dict[str, Any] = {} if special is None else {"add_special_tokens": special}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, rest) for _, context, rest in requests]
        results = self.scorer.score(pairs)
        for (key, *_), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def _cut(self, context: list[int], rest: list[int]) -> tuple[list[int], list[int]]:
        """What fits, cut on the left; a context keeps one token at least."""
        if len(rest) >= self.max_length:
            raise ConfigError(
                f"a continuation of {len(rest)} tokens does not fit in {self.max_length}; raise --max-length"
            )
        return context[-(self.max_length - len(rest)) :], rest

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in windows that do not overlap."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            of_text = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,  # the token in front is not counted
                    context_len=1,
                )
            ]
            windows += [(None, context, rest) for context, rest in of_text]
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts."""
        prompts, stops = [], []
        end = self.tokenizer.decode([self.eot_token_id])
        for request in requests:
            text, settings = request.args
            how = normalize_gen_kwargs(dict(settings), GENERATED)
            if how["do_sample"]:
                raise ConfigError(
                    "a task samples its texts (do_sample), which is not repeatable; quantkit decodes greedily"
                )
            until = handle_stop_sequences(list(how["until"]), end)
            limit = min(int(how["max_gen_toks"]), self.max_length - 1)
            prompts.append((self.tok_encode(text)[-(self.max_length - limit) :], limit, until))
            stops.append(until)
        texts = self.scorer.generate(prompts)
        return [postprocess_generated_text(t, stop, None) for t, stop in zip(texts, stops, strict=True)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as the tokenizer's chat template writes them."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
