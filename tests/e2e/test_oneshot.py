"""`oneshot`: llm-compressor's example as it is written, objects and paths to the same bytes, what runs is saved."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit import oneshot
from quantkit.audit import audit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CalibrationError, CheckpointError, ConfigError, PlanError, QuantkitError
from quantkit.formats.source import WeightSource
from quantkit.modifiers import AWQModifier, GPTQModifier, QuantizationModifier, SmoothQuantModifier

from ..engine.tiny import make
from .jobs import EXAMPLES

transformers = pytest.importorskip("transformers")

MODELS, CALIBRATION = EXAMPLES / "models", EXAMPLES / "data" / "calibration.jsonl"
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
SAMPLES = [json.loads(line) for line in CALIBRATION.read_text().splitlines()]
SEED = [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]


def load(name: str | Path, dtype: Any = "auto") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=dtype)


def logits(model: torch.nn.Module, vocabulary: int = 2048) -> torch.Tensor:
    ids = torch.arange(3, 131).reshape(2, 64) % vocabulary
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean difference of logits over their spread."""
    return float((a - b).abs().mean() / b.std())


def rows(count: int = 8, length: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 128, (count, length), generator=generator).tolist()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-moe"])
def test_llm_compressors_example_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, data and the import lines are ours; the rest is the example of vLLM's page on INT8, line by line."""
    load_dataset = pytest.importorskip("datasets").load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    MODEL_ID = str(MODELS / name)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_ID, device_map="auto", torch_dtype="auto",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)
    tokenizer.chat_template = TEMPLATE
    before = logits(model)

    NUM_CALIBRATION_SAMPLES = 48
    MAX_SEQUENCE_LENGTH = 256

    ds = load_dataset("json", data_files=str(CALIBRATION), split="train", cache_dir=str(tmp_path / "cache"))
    ds = ds.map(lambda sample: {"messages": [{"role": "user", "content": sample["text"]}]})
    ds = ds.shuffle(seed=42).select(range(NUM_CALIBRATION_SAMPLES))

    def preprocess(example):  # type: ignore[no-untyped-def]
        return {"text": tokenizer.apply_chat_template(example["messages"], tokenize=False)}

    ds = ds.map(preprocess)

    def tokenize(sample):  # type: ignore[no-untyped-def]
        return tokenizer(
            sample["text"], padding=False, max_length=MAX_SEQUENCE_LENGTH, truncation=True, add_special_tokens=False
        )

    ds = ds.map(tokenize, remove_columns=ds.column_names)

    recipe = [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ]

    oneshot(
        model=model,
        dataset=ds,
        recipe=recipe,
        max_seq_length=MAX_SEQUENCE_LENGTH,
        num_calibration_samples=NUM_CALIBRATION_SAMPLES,
    )

    SAVE_DIR = MODEL_ID.split("/")[-1] + "-W8A8-Dynamic-Per-Token"
    model.save_pretrained(SAVE_DIR, save_compressed=True)
    tokenizer.save_pretrained(SAVE_DIR)

    after = logits(model)
    assert 0 < distance(after, before) < 0.05
    prompt = tokenizer("The history of the city", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] == prompt.input_ids.shape[1] + 8
    config = json.loads(Path(SAVE_DIR, "config.json").read_text())["quantization_config"]
    assert (config["format"], config["quant_method"]) == ("int-quantized", "compressed-tensors")
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in Path(SAVE_DIR).iterdir()
    }
    with Checkpoint(MODELS / name) as source:
        result = audit(Path(SAVE_DIR), source, progress=False)
    assert result.ok, result.render()
    if name == "tiny-llama":
        # Transformers reads experts packed or in FP8, not as int8 (5.22).
        pytest.importorskip("compressed_tensors")
        again = AutoModelForCausalLM.from_pretrained(SAVE_DIR, dtype="auto")
        assert distance(logits(again), after) < 0.03
        assert AutoTokenizer.from_pretrained(SAVE_DIR).chat_template == TEMPLATE


RECIPES: dict[str, Any] = {
    "seed": SEED,
    "gptq": GPTQModifier(scheme="W4A16"),
    "awq": [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM")],
    "static": QuantizationModifier(scheme="W8A8_STATIC_ASYM", kv_cache_scheme="fp8"),
    "data_free": "QuantizationModifier: {scheme: FP8_BLOCK}",
    "mixed": [
        QuantizationModifier(scheme="FP8_DYNAMIC", targets=r"re:.*self_attn.*"),
        GPTQModifier(scheme="W4A16", targets=[r"re:.*mlp.*"]),
    ],
}


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_object_and_a_path_give_the_same_bytes(name: str, recipe: str, tmp_path: Path) -> None:
    data = [row * 2 for row in rows(16, 64)]
    streamed = oneshot(str(MODELS / name), recipe=RECIPES[recipe], dataset=data, output_dir=tmp_path / "streamed")
    assert streamed == tmp_path / "streamed"
    model = load(name)
    assert oneshot(model, recipe=RECIPES[recipe], dataset=data, output_dir=tmp_path / "saved") is model
    one, two = ((folder / "model.safetensors").read_bytes() for folder in (streamed, tmp_path / "saved"))
    assert one == two
    blocks = [
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (streamed, tmp_path / "saved")
    ]
    assert blocks[0] == blocks[1]
    assert {p.name for p in streamed.iterdir()} == {p.name for p in (tmp_path / "saved").iterdir()}
    with Checkpoint(MODELS / name) as source:
        result = audit(tmp_path / "saved", source, progress=False)
    assert result.ok, result.render()
    with Checkpoint(streamed) as checkpoint:
        weights = WeightSource(checkpoint)
        live = {k: v for k, v in model.state_dict().items() if k in weights.names()}
        assert len(live) > 10
        for key, value in live.items():
            assert torch.equal(weights.get(key).to(value.dtype), value), key


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W8A8_STATIC_ASYM", "FP8_BLOCK", "W4A16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_what_runs_is_what_is_saved(model_type: str, scheme: str, tmp_path: Path) -> None:
    """The live model computes what quantkit's own reader makes of the saved one, in fp32."""
    from quantkit.evaluate import compare, open_source

    wide = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    if model_type == "deepseek_v3":
        wide |= {"head_dim": 8, "v_head_dim": 32, "q_lora_rank": 128, "kv_lora_rank": 128}
    model = make(tmp_path / "source", model_type, **wide)
    oneshot(model, recipe=QuantizationModifier(scheme=scheme), dataset=rows(), progress=False)
    model.save_pretrained(tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    data = rows(4, 32)
    figures = compare([tmp_path / "out"], [open_source(tmp_path / "out")], data, progress=False)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor(data)).logits.float()
    loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), torch.tensor(data)[:, 1:].flatten())
    assert abs(float(loss) - torch.log(torch.tensor(figures["perplexity"]))) < 2e-3
    model.save_pretrained(tmp_path / "dense", save_compressed=False)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert {k: v.shape for k, v in dense.items()} == {k: v.shape for k, v in source.items()}
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    for hooked in model.modules():
        hooked._forward_pre_hooks.clear()
    assert distance(logits(plain, 128), logits(model, 128)) < 1e-5
    assert any(n.endswith(".weight_scale") for n in names)


def test_an_fp8_moe_is_read_by_transformers(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    for scheme in ("FP8_DYNAMIC", "W4A16"):
        model = load("tiny-moe")
        oneshot(model, recipe=QuantizationModifier(scheme=scheme), output_dir=tmp_path / scheme)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / scheme, dtype="auto")
        assert distance(logits(again), logits(model)) < 0.06


def test_a_path_without_output_is_loaded(tmp_path: Path) -> None:
    model = oneshot(str(MODELS / "tiny-llama"), recipe=QuantizationModifier(scheme="W8A8"), precision="float32")
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "out", max_shard_size="2MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    dense = oneshot(
        MODELS / "tiny-llama", recipe="QuantizationModifier: {scheme: W8A8}", output_dir=tmp_path / "dense",
        save_compressed=False,
    )  # fmt: skip
    assert isinstance(dense, transformers.PreTrainedModel)
    assert distance(logits(load(tmp_path / "dense")), logits(load("tiny-llama"))) < 0.05


def test_a_model_is_untouched_until_all_is_computed(tmp_path: Path) -> None:
    model = make(tmp_path, "llama")
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantkitError, match=r"layers\.2"):
        oneshot(model, recipe=GPTQModifier(scheme="W8A8"), dataset=rows(), progress=False)
    assert all(torch.equal(v, model.state_dict()[k]) or k.endswith("2.mlp.down_proj.weight") for k, v in before.items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = 0
    oneshot(model, recipe=GPTQModifier(scheme="W8A8"), dataset=rows(), progress=False)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = load("tiny-llama")
    oneshot(model, recipe=QuantizationModifier(scheme="W8A8"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_copy_and_a_pickle_are_quantized_too(tmp_path: Path) -> None:
    model = load("tiny-moe")
    oneshot(model, recipe=QuantizationModifier(scheme="W8A8_STATIC"), dataset=rows())
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(twin), logits(model))
        twin.save_pretrained(tmp_path / "twin")
        assert (tmp_path / "twin" / "config.json").exists()


def test_saving_into_a_folder_keeps_what_is_there(tmp_path: Path) -> None:
    model = load("tiny-llama")
    model.save_pretrained(tmp_path / "out", max_shard_size="2MB")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    oneshot(model, recipe=QuantizationModifier(scheme="W4A16"))
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"notes.txt", "model.safetensors", "config.json"} <= names
    assert not {n for n in names if "-of-" in n or "index" in n or n.startswith(".")}
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert WeightSource(checkpoint).modules


def test_what_has_no_effect_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    model = load("tiny-llama")
    recipe = [QuantizationModifier(scheme="W8A8", index=3)]
    oneshot(model, recipe=recipe, dataset=["text"], pipeline="sequential", batch_size=4, log_dir=None, progress=False)
    said = capfd.readouterr().err.splitlines()
    assert "quantkit: accepted, without effect: pipeline, batch_size, log_dir, QuantizationModifier.index" in said
    assert "quantkit: W8A8 needs no data: dataset is ignored" in said


def test_fewer_samples_than_asked_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    oneshot(load("tiny-llama"), recipe=QuantizationModifier(scheme="FP8"), dataset=SAMPLES[:3], max_seq_length=32)
    said = capfd.readouterr().err
    assert "512 samples were asked for, 3 are there" in said
    assert "calibrating with 3 rows, 96 tokens" in said


def test_experts_by_the_call(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = oneshot(
        MODELS / "tiny-moe", recipe=GPTQModifier(scheme="W4A16"), dataset=rows(), output_dir=tmp_path / "out",
        moe_calibrate_all_experts=True, min_tokens_per_module=0.5, progress=False,
    )  # fmt: skip
    recipe = json.loads((folder / "quantkit_config.json").read_text())["config"]["compression"]["recipe"]
    arguments = recipe["quant_stage"]["quant_modifiers"]["GPTQModifier"]
    assert (arguments["moe_calibrate_all_experts"], arguments["min_tokens_per_module"]) == (True, 256)


def test_importing_quantkit_imports_no_torch() -> None:
    code = (
        "import sys, quantkit; from quantkit import oneshot; assert callable(oneshot); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "import quantkit._oneshot; from quantkit import oneshot; assert oneshot.__name__ == 'oneshot'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Bad input


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model that no bad call may change."""
    model = make(tmp_path_factory.mktemp("tiny"), "llama")
    before = copy.deepcopy(model.state_dict())
    yield model
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert not hasattr(model, "_quantkit")


GPTQ = GPTQModifier(scheme="W8A8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "recipe: is missing"),
        ({"recipe": 3}, "recipe: expected modifiers"),
        ({"recipe": "GPTQModifer"}, "did you mean 'GPTQModifier'"),
        ({"recipe": SmoothQuantModifier()}, "no modifier that quantizes"),
        ({"recipe": GPTQ, "stage": "quant", "dataset": rows()}, "no such stage"),
        ({"recipe": GPTQ, "recipe_args": 3, "dataset": rows()}, "recipe_args: expected a mapping"),
        ({"recipe": GPTQ}, "dataset: is missing, and GPTQ W8A8 looks at activations"),
        ({"recipe": GPTQ, "dataset": []}, "calibration data: no sample"),
        ({"recipe": GPTQ, "dataset": torch.empty(0, 8, dtype=torch.long)}, "calibration data: no sample"),
        ({"recipe": GPTQ, "dataset": [[]]}, "calibration data: no sample"),
        ({"recipe": GPTQ, "dataset": [[5]]}, "sample 0: has one token only"),
        ({"recipe": GPTQ, "dataset": [[5, 6], [5], [7]], "shuffle_calibration_samples": False},
         r"sample 1: has one token only \(and 1 more of 3 rows\)"),
        ({"recipe": GPTQ, "dataset": [[5, 600]]}, "token id 600 is not in the model's vocabulary of 128"),
        ({"recipe": GPTQ, "dataset": [[5, -1]]}, "token id -1"),
        ({"recipe": GPTQ, "dataset": [[5.0, 6.0]]}, "flat list of integers"),
        ({"recipe": GPTQ, "dataset": torch.ones(2, 3, 4, dtype=torch.long)}, r"\[rows, tokens\], got \[2, 3, 4\]"),
        ({"recipe": GPTQ, "dataset": [5, 6]}, "expected text, a mapping or token ids, got int"),
        ({"recipe": GPTQ, "dataset": 3}, "dataset: expected a Dataset, a list"),
        ({"recipe": GPTQ, "dataset": "nosuch.jsonl"}, "dataset: no such file or folder: nosuch.jsonl"),
        ({"recipe": GPTQ, "dataset": "ultrachat_200k"}, "llm-compressor fetches by itself; load it with"),
        ({"recipe": GPTQ, "dataset": "x" * 9000}, "dataset: no such file or folder"),
        ({"recipe": GPTQ, "dataset": [{"words": "a b"}]}, "has 'words'; expected 'messages'"),
        ({"recipe": GPTQ, "dataset": {"train": ["a"], "test": ["b"]}}, "has the splits train, test; say which"),
        ({"recipe": GPTQ, "dataset": {"train": ["a"]}, "splits": "trian"}, "no split 'trian' .did you mean 'train'"),
        ({"recipe": GPTQ, "dataset": {"train": ["a"]}, "splits": "train[x]"}, "is no split"),
        ({"recipe": GPTQ, "dataset": rows(), "dataset_path": "x"}, "dataset_path: and dataset both given"),
        ({"recipe": GPTQ, "dataset": SAMPLES, "tokenizer": 3}, "tokenizer: expected one of Transformers"),
        ({"recipe": GPTQ, "dataset": SAMPLES, "tokenizer": "/nosuch"}, "its tokenizer cannot be loaded"),
        ({"recipe": GPTQ, "dataset": SAMPLES}, "holds text, and the model does not say where its tokenizer is"),
        ({"recipe": GPTQ, "dataset": [{"messages": [{"role": "user", "content": "Hi"}]}],
          "tokenizer": str(MODELS / "tiny-llama")}, "no chat template; put a chat_template"),
        ({"recipe": GPTQ, "dataset": rows(), "num_calibration_samples": 0}, "num_calibration_samples: 0 must be"),
        ({"recipe": GPTQ, "dataset": rows(), "num_calibration_samples": "8"}, "calibration_samples: expected an int"),
        ({"recipe": GPTQ, "dataset": rows(), "max_seq_length": 1}, "max_seq_length: 1 must be at least 2"),
        ({"recipe": GPTQ, "dataset": rows(), "max_seq_length": True}, "max_seq_length: expected an integer"),
        ({"recipe": GPTQ, "dataset": rows(), "precision": "bf16"}, "precision: no such dtype.*did you mean 'bfloat16'"),
        ({"recipe": GPTQ, "dataset": rows(), "calibration_forwards": 3}, "calibration_forwards: 3: use auto, 1 or 2"),
        ({"recipe": GPTQ, "dataset": rows(), "min_tokens_per_module": -1}, "min_tokens_per_module: -1 is negative"),
        ({"recipe": GPTQ, "dataset": rows(), "moe_calibrate_all_experts": 1}, "all_experts: expected true"),
        ({"recipe": GPTQ, "datset": rows()}, "no argument 'datset' .did you mean 'dataset'"),
        ({"recipe": GPTQ, "dataset": rows(), "output_dir": 3}, "output_dir: expected a folder"),
        ({"recipe": GPTQ, "dataset": rows(), "output_dir": str(EXAMPLES)}, "is not empty.*overwrite=True"),
        ({"recipe": GPTQ, "dataset": rows(), "output_dir": __file__}, "is a file"),
        ({"recipe": QuantizationModifier(scheme="W4A16")}, "not divisible by 128"),
        ({"recipe": QuantizationModifier(scheme="W8A8", ignore=["lm_haed"])}, "did you mean 'lm_head'"),
        ({"recipe": QuantizationModifier(scheme="W8A8", targets="re:.*nosuch")}, "nosuch"),
        ({"recipe": [SmoothQuantModifier(mappings=[[["q_prj"], "input_layernorm"]]), GPTQ], "dataset": rows()},
         "'q_prj' matches no module"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_at_once(arguments: dict[str, Any], message: str, tiny: Any, tmp_path: Path) -> None:
    original = tiny.config._name_or_path
    tiny.config._name_or_path = ""
    try:
        with pytest.raises(QuantkitError, match=message):
            oneshot(tiny, **arguments, progress=False)
    finally:
        tiny.config._name_or_path = original


class Wrapped:
    merge_and_unload = None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "expected a causal language model of Transformers or the path of one, got None"),
        (3, "got 3"),
        (torch.nn.Linear(2, 2), "got a Linear"),
        (Wrapped(), "carries adapters; pass model.merge_and_unload"),
        ("/nosuch/folder", "no such folder"),
        ("", "no model given"),
        (EXAMPLES / "data" / "calibration.jsonl", "is a file"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, message: str) -> None:
    with pytest.raises(QuantkitError, match=message):
        oneshot(model, recipe=QuantizationModifier(scheme="W8A8"))


def test_models_that_cannot_be_quantized_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    recipe = QuantizationModifier(scheme="W8A8")
    model = make(tmp_path / "plain", "llama")
    with pytest.raises(PlanError, match="has no head over a vocabulary"):
        oneshot(AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain"), recipe=recipe)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(PlanError, match=r"is not in memory.*output_dir"):
        oneshot(empty, recipe=recipe)
    with pytest.raises(PlanError, match="float64"):
        oneshot(copy.deepcopy(model).double(), recipe=recipe)
    oneshot(model, recipe=recipe, output_dir=tmp_path / "out")
    with pytest.raises(PlanError, match="already quantized, by an earlier oneshot"):
        oneshot(model, recipe=recipe)
    with pytest.raises(PlanError, match="already quantized"):
        oneshot(tmp_path / "out", recipe=recipe, output_dir=tmp_path / "again")
    pytest.importorskip("compressed_tensors")
    with pytest.raises(PlanError, match=r"already quantized .quant_method 'compressed-tensors'"):
        oneshot(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), recipe=recipe)


def test_nan_in_activations_names_the_layer(tmp_path: Path) -> None:
    model = make(tmp_path, "llama")
    model.model.layers[1].input_layernorm.weight.data[4] = float("inf")
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn.*NaN or Inf"):
        oneshot(model, recipe=GPTQ, dataset=rows(), progress=False)


def test_bad_saves_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "source", "llama")
    model.config._name_or_path = str(tmp_path / "source")
    oneshot(model, recipe=QuantizationModifier(scheme="W8A8"), progress=False)
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ({"save_directory": tmp_path / "source"}, "is the folder that the model came from"),
        ({"save_directory": tmp_path / "file"}, "is a file"),
        ({"save_directory": None}, "expected a folder"),
        ({"save_directory": tmp_path / "x", "push_to_hub": True}, "upload_folder"),
        ({"save_directory": tmp_path / "x", "safe_serialization": False}, "safe_serialization=False is not supported"),
        ({"save_directory": tmp_path / "x", "quantization_format": "dense"}, "follows from the scheme"),
        ({"save_directory": tmp_path / "x", "save_compresed": False}, "did you mean 'save_compressed'"),
        ({"save_directory": tmp_path / "x", "max_shard_size": "5 apples"}, "max_shard_size"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            model.save_pretrained(**arguments)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", safe_serialization=True, is_main_process=True)
    assert (tmp_path / "x" / "config.json").exists()


@pytest.mark.parametrize("kv_cache", ["fp8", "int8", {"num_bits": 8, "type": "float", "strategy": "attn_head"}])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_the_cache_is_rounded_as_it_is_saved(model_type: str, kv_cache: Any, tmp_path: Path) -> None:
    from quantkit.evaluate import compare, open_source

    model = make(tmp_path / "source", model_type)
    data = rows(4, 32)
    recipe = QuantizationModifier(kv_cache_scheme=kv_cache)
    with torch.inference_mode():
        before = model(input_ids=torch.tensor(data)).logits
        oneshot(model, recipe=recipe, dataset=data, output_dir=tmp_path / "out", progress=False)
        out = model(input_ids=torch.tensor(data)).logits
    assert 1e-4 < distance(out, before) < 0.1
    loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), torch.tensor(data)[:, 1:].flatten())
    figures = compare([tmp_path / "out"], [open_source(tmp_path / "out")], data, progress=False)
    assert abs(float(loss) - torch.log(torch.tensor(figures["perplexity"]))) < 1e-3
    generated = model.generate(torch.tensor(data)[:, :8], max_new_tokens=4, do_sample=False)
    assert generated.shape == (4, 12)
