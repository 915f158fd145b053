"""Evaluation: streamed figures are those of Transformers on the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibration.dataset import load_tokenizer, text_rows
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.evaluate import Evaluation, compare, evaluate

from .tiny import FileSource, make

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"


def rows(count: int, length: int = 32) -> list[list[int]]:
    return torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(2)).tolist()


def logits(
    folder: Path, tokens: list[list[int]], quantizers: dict[str, Callable[[Tensor], Tensor]] | None = None
) -> Tensor:
    """fp32 log-probabilities [predicted tokens, vocabulary] by Transformers on the whole model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, quantizer in (quantizers or {}).items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))
    with torch.no_grad():
        found = model(input_ids=torch.tensor(tokens), output_router_logits=False).logits
    return torch.log_softmax(found[:, :-1].flatten(0, 1), -1)


def perplexity(logs: Tensor, tokens: list[list[int]]) -> float:
    targets = torch.tensor(tokens)[:, 1:].reshape(-1)
    return math.exp(-float(logs.gather(1, targets[:, None]).double().mean()))


def wikitext(folder: Path) -> Path:
    return folder / "wikitext2.test.tokens.txt"


@pytest.mark.parametrize(("model", "expected"), [("tiny-llama", 30.2182), ("tiny-moe", 33.7725)])
def test_full_precision_perplexity_of_the_embedded_models(model: str, expected: float, shared_data: Path) -> None:
    result = evaluate(EXAMPLES / model, wikitext(shared_data), progress=False)
    assert result.tokens == 100 * 255
    assert round(result.perplexity, 4) == expected
    assert result.kl is None and result.reference_perplexity is None


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_figures_are_those_of_the_whole_models(model_type: str, tmp_path: Path) -> None:
    """A model against a reference that differs from it by noise on one weight, with the head's input quantized."""
    from safetensors.torch import load_file, save_file

    ours, reference = tmp_path / "ours", tmp_path / "reference"
    make(ours, model_type)
    make(reference, model_type)
    tensors = load_file(ours / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    tensors[f"{name}.weight"] += 0.05 * torch.randn_like(tensors[f"{name}.weight"])
    save_file(tensors, ours / "model.safetensors", metadata={"format": "pt"})
    source = FileSource(ours)
    source.input_quantizers = {
        "model.layers.0.self_attn.q_proj": lambda x: (x * 4).round() / 4,
        "lm_head": lambda x: (x * 16).round() / 16,
    }
    tokens = rows(6)
    figures = compare([ours, reference], [source, FileSource(reference)], tokens, progress=False)
    mine, theirs = logits(ours, tokens, source.input_quantizers), logits(reference, tokens)
    assert figures["perplexity"] == pytest.approx(perplexity(mine, tokens), rel=1e-5)
    assert figures["reference_perplexity"] == pytest.approx(perplexity(theirs, tokens), rel=1e-5)
    kl = float((theirs.double().exp() * (theirs - mine).double()).sum(-1).mean())
    assert kl > 1e-3
    assert figures["kl"] == pytest.approx(kl, rel=1e-3)
    agreement = float((mine.argmax(-1) == theirs.argmax(-1)).double().mean())
    assert figures["top1"] == pytest.approx(agreement, abs=1.5 / mine.shape[0])


def test_a_model_against_itself(tmp_path: Path) -> None:
    make(tmp_path, "qwen3")
    figures = compare([tmp_path] * 2, [FileSource(tmp_path), FileSource(tmp_path)], rows(3), progress=False)
    assert figures["kl"] == 0.0 and figures["top1"] == 1.0
    assert figures["perplexity"] == figures["reference_perplexity"]


def test_logits_are_compared_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "llama")
    sources = [FileSource(tmp_path)]
    whole = compare([tmp_path], sources, rows(4), progress=False)
    monkeypatch.setattr("quantkit.evaluate.LOGITS_BYTES", 4 * 128 * 7)  # seven tokens at a time
    assert compare([tmp_path], sources, rows(4), progress=False)["perplexity"] == pytest.approx(whole["perplexity"])


def test_rows_of_unequal_length_count_real_tokens_only(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    tokens = [row[:n] for row, n in zip(rows(3), (32, 30, 25), strict=True)]
    found = compare([tmp_path], [FileSource(tmp_path)], tokens, progress=False)["perplexity"]
    alone = [logits(tmp_path, [row]) for row in tokens]
    parts = [-math.log(perplexity(log, [row])) * (len(row) - 1) for log, row in zip(alone, tokens, strict=True)]
    assert found == pytest.approx(math.exp(-sum(parts) / sum(len(row) - 1 for row in tokens)), rel=1e-5)


def test_vocabularies_have_to_agree(tmp_path: Path) -> None:
    make(tmp_path / "a", "llama")
    make(tmp_path / "b", "llama", vocab_size=64)
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(CheckpointError, match="cannot be compared"):
        compare(folders, [FileSource(f) for f in folders], [[1, 2, 3]], progress=False)


def test_text_windows_are_the_first_of_the_file(shared_data: Path) -> None:
    tokenizer = load_tokenizer(EXAMPLES / "tiny-llama")
    text = wikitext(shared_data).read_text()
    ids = tokenizer(text[:400_000], add_special_tokens=False)["input_ids"]
    rows = text_rows(wikitext(shared_data), tokenizer, 256, 100)
    assert [token for row in rows for token in row] == ids[: 100 * 256]


def test_bad_folders_and_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        evaluate(tmp_path, tmp_path / "text.txt")
    with pytest.raises(CalibrationError, match=r"absent\.txt: cannot be read"):
        evaluate(EXAMPLES / "tiny-llama", tmp_path / "absent.txt")


def test_the_table() -> None:
    alone = Evaluation("out/model", "text.txt", 255, 30.21821)
    assert "30.2182" in alone.render() and "KL" not in alone.render()
    both = Evaluation("out/model", "text.txt", 255, 30.5, "src/model", 30.0, 0.01234, 0.9876)
    for figure in ("30.5000", "30.0000", "+1.667%", "0.01234", "0.9876", "src/model"):
        assert figure in both.render()
