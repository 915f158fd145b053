"""Scores and texts from vLLM, in a process of its own: `backend: vllm`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from . import Pair, longest

VARIABLE = "QUANTKIT_VLLM_PYTHON"
WORKER = Path(__file__).with_name("vllm_worker.py")


def interpreter(named: str | Path | None = None) -> str:
    """The Python that has vLLM: `named`, or that of QUANTKIT_VLLM_PYTHON, or this one. ConfigError if there is none."""
    found = named or os.environ.get(VARIABLE)
    if found:
        if not os.access(found, os.X_OK):
            raise ConfigError(f"{'--vllm-python' if named else VARIABLE}: {found} is no interpreter that can be run")
        return str(found)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "backend 'vllm': this Python has no vLLM; install it, or name an interpreter that has it with "
            f"--vllm-python or {VARIABLE} (it needs nothing of quantkit)"
        )
    return sys.executable


class VllmScorer:
    """vLLM's `LLM` of the model in `folder`, spoken to through a pipe."""

    def __init__(
        self,
        folder: Path,
        dtype: Any,
        max_length: int | None,
        trust_remote_code: bool,
        python: str | Path | None,
    ) -> None:
        self.folder = folder
        command = interpreter(python)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        positions = (config.get("text_config") or config).get("max_position_embeddings")
        self.max_length = longest(positions, max_length) - 1  # it makes one token, whatever is asked
        settings = {
            "model": str(folder),
            "dtype": "auto" if dtype is None else str(dtype).removeprefix("torch."),
            "max_model_len": self.max_length + 1,
            "trust_remote_code": trust_remote_code,
        }
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in `close`)
        self.process = subprocess.Popen(
            [command, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        ready = self._ask(settings)
        self.describe = f"vLLM {ready['version']}, {ready['dtype']}"

    def _ask(self, question: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            told = self.log.read()
            self.close()
            raise CheckpointError(f"{self.folder}: vLLM stopped; the end of what it said:\n{told[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise CheckpointError(
                f"{self.folder}: vLLM refuses it: {answer['error']}\n"
                f"'quantkit check {self.folder} --for vllm' says which rule it breaks"
            )
        return answer

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `Scorer`."""
        most = max((len(context) + len(rest) for context, rest in pairs), default=0)
        if most > self.max_length:
            raise ConfigError(
                f"a text of {most} tokens; vLLM takes {self.max_length} of this model, and makes one more"
            )
        found = self._ask({"score": [[list(context), list(rest)] for context, rest in pairs]})["scores"]
        return [(float(logprob), bool(greedy)) for logprob, greedy in found]

    def generate(self, prompts: Sequence[tuple[Sequence[int], int, Sequence[str]]]) -> list[str]:
        """See `Scorer`."""
        texts: list[str] = self._ask({"generate": [[list(p), limit, list(stops)] for p, limit, stops in prompts]})[
            "texts"
        ]
        return texts

    def close(self) -> None:
        """See `Scorer`."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()
