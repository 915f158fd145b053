"""Models named by folder or hub id; the hub is a local cache laid out as huggingface_hub does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, errors

from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError

from .checkpoint_files import header_of, raw, single

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment on import


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds the model `org/tiny`: links from snapshots to blobs."""
    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    files = {"config.json": b"{}", "model.safetensors": raw(*header_of(["a"])), "tokenizer.json": b"tokens"}
    for i, (name, content) in enumerate(files.items()):
        (repo / "blobs" / f"{i:064x}").write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / f"{i:064x}")
    return tmp_path / "hub"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_model(cache: Path, revision: str | None) -> None:
    folder = resolve_model("org/tiny", cache_dir=cache, revision=revision)
    assert folder.resolve() == (cache / "models--org--tiny" / "snapshots" / COMMIT).resolve()
    checkpoint = Checkpoint(folder)
    assert checkpoint.tensor("a").view(torch.uint8).tolist() == [1] * 8
    assert [path.read_bytes() for path in checkpoint.side_files] == [b"tokens"]
    (cache.parent / "link").symlink_to(folder)
    assert Checkpoint(cache.parent / "link").tensors == checkpoint.tensors


def test_links_of_the_cache_to_elsewhere_are_refused(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "models--org--tiny" / "snapshots" / COMMIT
    (tmp_path / "blobs").mkdir()
    for target in (tmp_path / "secret", tmp_path / "blobs" / "secret", cache / "models--org--tiny" / "secret"):
        target.write_text("{}")
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer.json").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a symbolic link to .*secret, outside"):
            Checkpoint(snapshot)


@pytest.mark.usefixtures("offline")
def test_model_that_is_not_cached(cache: Path) -> None:
    for name, revision in (("org/other", None), ("org/tiny", "v2")):
        with pytest.raises(CheckpointError, match=rf"'{name}'.*HF_HUB_OFFLINE is set, and .*{cache}") as caught:
            resolve_model(name, cache_dir=cache, revision=revision)
        assert "no folder" in str(caught.value)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = single(tmp_path / "models" / "tiny-llama")
    assert resolve_model(str(folder)) == resolve_model(folder) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model("models/tiny-llama") == Path("models/tiny-llama")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/models/tiny-llama") == folder
    for wrong, reason in (
        (str(tmp_path / "models" / "tiny-lama"), "did you mean 'tiny-llama'"),
        (str(tmp_path / "model" / "tiny-llama"), "did you mean 'models'"),
        ("./tiny-llama", "no such folder"),
        ("models/tiny/llama", "no such folder"),
        (Path("models") / "absent", "no such folder"),
        (folder / "config.json", "is a file"),
        ("", "no model given"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            resolve_model(wrong)
    with pytest.raises(CheckpointError, match="has no revision 'v2'"):
        resolve_model(folder, revision="v2")


# The HTTP library of huggingface_hub, whichever its release uses.
http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]


def response(status: int) -> Any:
    return http.Response(status, request=http.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.GatedRepoError("x", response=response(403)), "accept them on the model's page"),
        (errors.RepositoryNotFoundError("x", response=response(404)), "no such model, or it is private"),
        (errors.RevisionNotFoundError("x", response=response(404)), "not this revision"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (errors.HfHubHTTPError("status 500", response=response(500)), "the download failed: status 500"),
        (http.ProxyError("bad proxy"), "the download failed: bad proxy"),
        (OSError(28, "No space left on device"), "the download failed: .*No space"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub(error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/tiny-llama")
    with pytest.raises(CheckpointError, match=f"'org/tiny-lama'.*{reason}") as caught:
        resolve_model("org/tiny-lama")
    if "no folder" in str(caught.value):
        assert "did you mean 'tiny-llama'" in str(caught.value)


def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    files += ["chat_template.jinja", "modeling_x.py", "LICENSE", "merges.txt", "generation_config.json"]
    other = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "original/params.json"]
    other += ["model.gguf", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "consolidated.00.pth"]
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: asked.update(options) or tmp_path)
    assert resolve_model("org/tiny", cache_dir=tmp_path, revision="v2") == tmp_path
    kept = filter_repo_objects(files + other, ignore_patterns=asked.pop("ignore_patterns"))
    assert list(kept) == files
    assert asked == {"cache_dir": tmp_path, "revision": "v2", "local_files_only": False}
