"""`quantkit generate`: text from a quantized model as it comes, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """A generated text and its speed. `prefill_seconds` is the time to the first token, which `prompt_tokens` took;
    `decode_seconds` that of the other `new_tokens - 1`.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    def render(self) -> str:
        """One line for the terminal."""
        rate = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        line = f"prefill: {self.prompt_tokens} tokens, {rate:.1f} tokens/s"
        if self.new_tokens > 1:
            rate = (self.new_tokens - 1) / max(self.decode_seconds, 1e-9)
            line += f"; decode: {self.new_tokens} tokens, {rate:.1f} tokens/s"
        return line


class _Clock:
    """A streamer of Transformers that notes when tokens come, and shows text as soon as its characters are complete."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.shown = 0
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if self.prompt:  # the prompt itself comes first
            self.prompt = False
            return
        self.times.append(time.perf_counter())
        self.tokens += value.flatten().tolist()
        text = self.text()
        # A character of several tokens shows as U+FFFD until the last of them is there.
        if not text.endswith("\ufffd"):
            self.show(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        self.show(self.text()[self.shown :])
        self.shown = len(self.text())

    def text(self) -> str:
        found: str = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return found


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    chat: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue `prompt` by up to `max_new_tokens` tokens; `show` gets the text piece by piece. `temperature` 0 takes
    the most probable token each time, else tokens are sampled, the same ones for the same `seed`. `chat`: `prompt` is a
    user's message, through the tokenizer's chat template. ConfigError for a prompt without tokens or a chat without
    template.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    if not temperature >= 0:
        raise ConfigError(f"temperature: {temperature} must be 0 (the most probable token) or more")
    ids = encode(tokenizer, prompt, chat)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    clock = _Clock(tokenizer, show)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=clock, **sampling
        )
    first = clock.times[0] if clock.times else started
    last = clock.times[-1] if clock.times else started
    return Generation(clock.text(), ids.shape[1], len(clock.tokens), first - started, last - first)


def encode(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """The token ids [1, tokens] of `prompt`."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("chat: the model's tokenizer has no chat template; leave --chat out")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt: {prompt!r} has no tokens; give some text")
    return torch.tensor([ids])
