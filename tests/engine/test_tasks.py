"""`quantkit eval --tasks`: lm-eval's figures, whoever computes; recovery; errors that say what to do."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.dataset import load_tokenizer
from quantkit.cli import main
from quantkit.errors import CheckpointError, ConfigError
from quantkit.evaluate import evaluate
from quantkit.scoring import layerwise, open_scorer
from quantkit.tasks import Figure, TaskResults, evaluate_tasks

lm_eval = pytest.importorskip("lm_eval")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY, TASKS = EXAMPLES / "models" / "tiny-llama", EXAMPLES / "tasks"
NAMES = ["short_endings", "short_paragraphs"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import quantkit

    folder = tmp_path_factory.mktemp("out") / "int4"
    recipe = "QuantizationModifier: {scheme: W4A16, ignore: [lm_head]}"
    quantkit.oneshot(str(TINY), recipe=recipe, output_dir=str(folder))
    return folder


def values(results: TaskResults) -> dict[tuple[str, str], float]:
    return {(f.task, f.metric): f.after for f in results.figures}


def test_figures_are_those_of_lm_evals_own_transformers_model() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from quantkit.integrations.lm_eval_model import ScoredLM

    theirs = HFLM(pretrained=str(TINY), dtype="float32", device="cpu", batch_size=8)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    expected = lm_eval.simple_evaluate(model=theirs, tasks=NAMES, task_manager=manager, bootstrap_iters=0)
    found = evaluate_tasks(TINY, NAMES, backend="dequantized", task_path=TASKS, progress=False)
    assert len(found.figures) == 4
    for (task, metric), value in values(found).items():
        assert value == pytest.approx(expected["results"][task][f"{metric},none"], rel=1e-5), (task, metric)
    assert [f.higher_is_better for f in found.figures] == [True, True, False, False]
    assert [f.samples for f in found.figures] == [40, 40, 6, 6]

    ours = ScoredLM(open_scorer(TINY, "hf"), load_tokenizer(TINY))
    how = {"until": ["."], "max_gen_toks": 24, "do_sample": False}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, dict(how)), idx=0)
        for text in ("The history of the city", "In the year", "<s>The film was")
    ]
    texts = ours.generate_until(requests)
    assert texts == theirs.generate_until(requests, disable_tqdm=True)
    assert all(texts) and not any("." in text for text in texts)
    # A text that is longer than the model's context goes in windows, a context that is too long loses its beginning.
    long = [Instance(request_type="x", doc={}, arguments=("The road runs to the north. " * 120,), idx=0)]
    pair = [Instance(request_type="x", doc={}, arguments=("It was a long road. " * 150, " north"), idx=0)]
    theirs._max_length = ours.max_length = ours.scorer.max_length = 128
    ours.max_length += 1  # tokens that count, and one in front
    assert ours.loglikelihood_rolling(long) == pytest.approx(theirs.loglikelihood_rolling(long), rel=1e-5)
    assert ours.loglikelihood(pair)[0][0] == pytest.approx(theirs.loglikelihood(pair)[0][0], rel=1e-5)


def test_backends_agree_and_recovery_is_told(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    for backend in ("dequantized", "quantkit", "hf"):
        what = ["--baseline", str(TINY), "--tasks", ",".join(NAMES), "--task-path", str(TASKS)]
        how = ["--backend", backend, "--json", str(tmp_path / "out.json")]
        assert main(["eval", str(quantized), *what, *how]) == 0
        found[backend] = json.loads((tmp_path / "out.json").read_text())["tasks"]
        printed = capsys.readouterr().out
        assert "recovery" in printed and "mean of tasks" in printed and "word_perplexity (less is better)" in printed
    # bits_per_byte is one per cent apart where one weight in a hundred changes; fp32 sums in another order are not.
    for key in ("after", "before", "recovery"):
        first = [f[key] for f in found["dequantized"]["figures"]]
        for other in ("quantkit", "hf"):
            assert [f[key] for f in found[other]["figures"]] == pytest.approx(first, rel=2e-5), (key, other)
    assert found["quantkit"]["baseline_backend"].startswith("quantkit, weights dequantized")
    perplexity = found["hf"]["figures"][2]
    assert perplexity["recovery"] == pytest.approx(100 * perplexity["before"] / perplexity["after"])
    assert 90 < perplexity["recovery"] < 100  # 4 bits cost something, and not much
    # Texts that do not go through the layers together score the same.
    monkeypatch.setattr(layerwise, "HIDDEN_BYTES", 40 * 256 * 4)
    parts = evaluate_tasks(quantized, NAMES, backend="dequantized", task_path=TASKS, progress=False)
    expected = [f["after"] for f in found["dequantized"]["figures"]]
    assert [f.after for f in parts.figures] == pytest.approx(expected, rel=1e-5)


def test_perplexity_through_transformers_is_that_of_the_codes(quantized: Path) -> None:
    text = EXAMPLES / "data" / "evaluation.txt"
    options: dict[str, Any] = {"windows": 4, "window_length": 128, "progress": False}
    own = evaluate(quantized, text, TINY, **options)
    theirs = evaluate(quantized, text, TINY, backend="hf", dtype="float32", **options)
    assert theirs.perplexity == pytest.approx(own.perplexity, rel=1e-5)
    assert theirs.reference_perplexity == pytest.approx(own.reference_perplexity, rel=1e-5)
    assert (theirs.kl, theirs.top1) == (None, None) and "KL" not in theirs.render()


def test_recovery_and_its_mean() -> None:
    figures = [
        Figure("a", "acc", True, 0.4, before=0.5),
        Figure("a", "acc_norm", True, 0.1, before=0.5),
        Figure("b", "perplexity", False, 20.0, before=10.0),
        Figure("c", "acc", True, 0.0, before=0.0),
    ]
    assert [f.recovery for f in figures] == [80.0, 20.0, 50.0, None]
    results = TaskResults("m", "x", figures, "n", "y")
    assert results.recovery == 65.0  # of a's first metric and b's
    assert "80.00 %" in results.render() and math.isclose(json.loads(results.to_json())["recovery"], 65)


def test_limit_and_samples() -> None:
    found = evaluate_tasks(TINY, ["short_endings"], backend="dequantized", task_path=TASKS, limit=5, progress=False)
    assert {f.samples for f in found.figures} == {5} and found.settings["limit"] == 5
    assert {f.task for f in evaluate_tasks(TINY, ["short_*"], backend="hf", task_path=TASKS, limit=2).figures} == {
        *NAMES
    }


def test_errors_say_what_to_do(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"named 'short_ending' \(did you mean 'short_endings'\?\).*--task-path"):
        evaluate_tasks(TINY, ["short_ending"], task_path=TASKS)
    with pytest.raises(ConfigError, match=r"--task-path: .*nowhere is not a folder"):
        evaluate_tasks(TINY, NAMES, task_path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"backend: 'vlm' is not one of .*\(did you mean 'vllm'\?\)"):
        evaluate_tasks(TINY, NAMES, backend="vlm")
    with pytest.raises(ConfigError, match="dtype: 'float8' is not one of"):
        evaluate_tasks(TINY, NAMES, backend="hf", dtype="float8", task_path=TASKS)
    with pytest.raises(ConfigError, match="no chat template"):
        evaluate_tasks(TINY, NAMES, backend="hf", task_path=TASKS, apply_chat_template=True)
    with pytest.raises(CheckpointError, match="not quantized"):
        evaluate_tasks(TINY, NAMES, backend="quantkit", task_path=TASKS)
    monkeypatch.delenv("QUANTKIT_VLLM_PYTHON", raising=False)
    with pytest.raises(ConfigError, match="--vllm-python"):
        evaluate_tasks(TINY, NAMES, backend="vllm", task_path=TASKS)
    with pytest.raises(ConfigError, match="no interpreter"):
        evaluate_tasks(TINY, NAMES, backend="vllm", task_path=TASKS, vllm_python=tmp_path / "python")
    # An interpreter without vLLM.
    with pytest.raises(CheckpointError, match="vllm"):
        evaluate_tasks(TINY, NAMES, backend="vllm", task_path=TASKS, vllm_python=sys.executable)
    assert main(["eval", str(TINY)]) == 2
    assert "--text FILE" in capsys.readouterr().err

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    (tasks / "writes.yaml").write_text(
        "task: writes\ncustom_dataset: !function data.samples\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{text}}'\ndoc_to_target: ''\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}\n"
    )
    (tasks / "data.py").write_text(
        "import datasets\ndef samples(**_):\n"
        "    return datasets.DatasetDict(test=datasets.Dataset.from_list([{'text': 'The city'}]))\n"
    )
    with pytest.raises(ConfigError, match=r"did not get the data.*--task-path"):
        evaluate_tasks(TINY, ["lost"], backend="dequantized", task_path=tasks, progress=False)
    with pytest.raises(ConfigError, match=r"generates no text.*--backend quantkit, hf or vllm"):
        evaluate_tasks(TINY, ["writes"], backend="dequantized", task_path=tasks, progress=False)
    assert evaluate_tasks(quantized, ["writes"], backend="quantkit", task_path=tasks).figures[0].metric == "exact_match"

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm_eval==0.4.13'.*extra 'eval'"):
        evaluate_tasks(TINY, NAMES)
