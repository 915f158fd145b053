"""`quantkit msmodelslim`: Ascend's command line over the engine, and layers that fall back by measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.cli import main
from quantkit.conformance import check_folder
from quantkit.fall_back import worst

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = str(EXAMPLES / "models" / "tiny-llama")


def command(data: Path, to: Path, *more: str) -> list[str]:
    """The seed's command, as it is written."""
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "calibration.jsonl").read_text().splitlines()[:6]]
    data.write_text("".join(json.dumps({"id": i, "inputs_pretokenized": r["text"]}) + "\n" for i, r in enumerate(rows)))
    given = f"--w_bit 8 --a_bit 8 --device_type cpu --calib_file {data}".split()
    return ["msmodelslim", "--model_path", MODEL, "--save_directory", str(to), *given, *more]


@pytest.mark.parametrize("method", ["1", "3"])
def test_the_command_of_mindie(method: str, tmp_path: Path) -> None:
    q = "model.layers.1.mlp.down_proj"
    more = ("--anti_method", "m1", "--act_method", method, "--disable_level", "L2", "--disable_names", q)
    more += ("--use_kvcache_quant", "True")
    assert main(command(tmp_path / "boolq.jsonl", tmp_path / "out", *more)) == 0
    described = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert described["model_quant_type"] == "W8A8" and described[f"{q}.weight"] == "FLOAT"
    assert described["kv_quant_type"] == described["model.layers.0.self_attn.k_proj.kv_cache_scale"] == "C8"
    kept = [n for n, kind in described.items() if n.endswith("_proj.weight") and kind == "FLOAT"]
    assert 3 <= len(kept) <= 5  # what reads one input falls back together
    assert check_folder(tmp_path / "out", "mindie").ok


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--anti_method", "m4"), "--anti_method m4: there are m1"),
        (("--act_method", "4"), "--act_method 4: there are 1"),
        (("--disable_names", "q_proj"), "--disable_names q_proj: the model has no Linear of that name"),
        (("--disable_level", "3"), "disable_level"),
        (("--co_sparse", "True"), "--co_sparse True: quantkit does only False"),
        (("--w_bit", "4"), "--w_bit 4 --a_bit 8"),
    ],
)
def test_what_it_does_not_do_is_refused(
    more: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "boolq.jsonl", tmp_path / "out", *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_worst_come_with_their_equals() -> None:
    scores = {"q": 5.0, "k": 5.0, "o": 9.0, "up": 1.0}
    assert worst(scores, 1) == ("o",) and worst(scores, 2) == ("q", "k", "o") and len(worst(scores, 9)) == 4
