"""transformers alone: quantize while loading, save, publish, write, evaluate."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bitfold
import tiny_lm
from bitfold.errors import UsageError
from bitfold.nn import QLinear, QWeight
from hub_server import HubServer

Auto = hf.AutoModelForCausalLM
IDS = torch.arange(20)[None]
WAYS: dict[str, dict[str, Any]] = {
    "bits alone": {"bits": 4},
    "8 bits": {"bits": 8},
    "rtn": {"bits": 3, "method": "rtn", "group_size": 32},
    "format": {"format": "nf4"},
    "rotated": {"format": "int4-g32", "transform": "hadamard", "seed": 3},
    "ignored": {"bits": 8, "ignore": ["*.mlp.*"]},
    "activations": {"bits": 8, "act": "int8"},
}


def config_of(**said: Any) -> Any:
    from bitfold.integrations.transformers import BitfoldConfig

    return BitfoldConfig(**said)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits.float()
    return found


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if torch.is_tensor(t)}


def same_tensors(a: Any, b: Any) -> None:
    """Equal bits: nothing is computed between the two, or the same by the same code."""
    one, other = tensors(a), tensors(b)
    assert set(one) == set(other)
    for name, t in one.items():
        assert t.dtype == other[name].dtype, name
        assert torch.equal(t, other[name]), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("hf") / "m", tiny_lm.model())


@pytest.mark.parametrize("way", WAYS)
def test_quantizing_while_loading_is_what_quantize_does(plain: Path, tmp_path: Path, way: str) -> None:
    said = dict(WAYS[way])
    model = Auto.from_pretrained(plain, quantization_config=config_of(**said))
    if way == "bits alone":  # the choice without calibration text
        said = {"format": "trellis-4", "transform": "hadamard", "method": "rtn"}
    bitfold.quantize(plain, tmp_path / "q", **said, keep_embeddings=True)
    expected = bitfold.load(tmp_path / "q")
    same_tensors(model, expected)
    assert any(isinstance(m, QLinear) for m in model.modules())
    assert model.config.quantization_config.tensors.keys() == expected.bitfold_config["tensors"].keys()
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_calibrated_while_loading(plain: Path, tmp_path: Path, method: str) -> None:
    """Factors that AWQ and SmoothQuant fold into norms come along."""
    text = tmp_path / "text.txt"
    text.write_text(tiny_lm.TEXT)
    said: dict[str, Any] = {"bits": 8, "method": method, "calibration": str(text)}
    model = Auto.from_pretrained(plain, quantization_config=config_of(**said))
    bitfold.quantize(plain, tmp_path / "q", **said, keep_embeddings=True)
    same_tensors(model, bitfold.load(tmp_path / "q"))


def test_what_cannot_be_asked_for(plain: Path) -> None:
    with pytest.raises(UsageError, match="bitz is no option"):
        config_of(bitz=4)
    with pytest.raises(UsageError, match="needs calibration text") as caught:
        Auto.from_pretrained(plain, quantization_config=config_of(bits=4, method="gptq"))
    assert "calibration=" in str(caught.value.hint)


@pytest.mark.parametrize("way", ["while loading", "loaded", "from_pretrained", "in place", "copied"])
def test_save_pretrained_writes_a_folder_of_bitfold(plain: Path, tmp_path: Path, way: str) -> None:
    bitfold.quantize(plain, tmp_path / "q", format="int4-g32", transform="hadamard")
    if way == "while loading":
        model: Any = Auto.from_pretrained(plain, quantization_config=config_of(bits=3))
    elif way == "in place":
        model = tiny_lm.model()
        bitfold.quantize_(model, "int8")
    else:
        model = Auto.from_pretrained(tmp_path / "q") if way == "from_pretrained" else bitfold.load(tmp_path / "q")
        model = copy.deepcopy(model) if way == "copied" else model
    model.save_pretrained(tmp_path / "s", max_shard_size="40KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    for again in (bitfold.load(tmp_path / "s"), Auto.from_pretrained(tmp_path / "s")):
        same_tensors(again, model)
        torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)


FAMILIES: dict[str, Any] = {
    "tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "conv1d": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2)),
    "experts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=3)),
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("everything", [False, True], ids=["usual", "embeddings too"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str, everything: bool) -> None:
    """Tied heads, turned weights, stacks of experts that transformers puts together while it loads."""
    torch.manual_seed(0)
    FAMILIES[family]().eval().save_pretrained(tmp_path / "m")
    rules = bitfold.Recipe((bitfold.Rule("*", "int8"),)) if everything else None
    said: dict[str, Any] = {"recipe": rules} if everything else {"bits": 8}
    model = Auto.from_pretrained(tmp_path / "m", quantization_config=config_of(**said))
    bitfold.quantize(tmp_path / "m", tmp_path / "q", **said, keep_embeddings=True)
    same_tensors(model, bitfold.load(tmp_path / "q"))
    model.save_pretrained(tmp_path / "s")
    again = Auto.from_pretrained(tmp_path / "s")
    same_tensors(again, model)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)


def test_a_new_head_is_left_alone(plain: Path) -> None:
    """What the checkpoint does not have is drawn at random by transformers, to be trained."""
    classes = hf.AutoModelForSequenceClassification
    model = classes.from_pretrained(plain, quantization_config=config_of(bits=8), num_labels=3)
    assert type(model.score) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QWeight)


def test_pipeline_generate_and_trainer(plain: Path, tmp_path: Path) -> None:
    model = Auto.from_pretrained(plain, quantization_config=config_of(bits=8))
    tokenizer = hf.AutoTokenizer.from_pretrained(plain)
    text = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)("abc", max_new_tokens=5, do_sample=False)
    inputs = tokenizer("abc", return_tensors="pt")
    same = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert text[0]["generated_text"] == tokenizer.decode(same[0], skip_special_tokens=True)
    data = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(3)]
    arguments = hf.TrainingArguments(str(tmp_path), report_to=[], per_device_eval_batch_size=1, use_cpu=True)
    loss = hf.Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"]  # type: ignore[arg-type]
    with torch.no_grad():
        assert loss == pytest.approx(float(model(input_ids=IDS, labels=IDS).loss), rel=1e-4)


ALONE = """
import site, sys
site.addsitedir({place!r})
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_a_process_where_only_transformers_is_imported(plain: Path, tmp_path: Path) -> None:
    """The line of docs/transformers.md: a .pth file."""
    bitfold.quantize(plain, tmp_path / "q", bits=8)
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "bitfold.pth").write_text("import bitfold\n")
    code = ALONE.format(place=str(tmp_path / "place"), folder=str(tmp_path / "q"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "QLinear"


class OfAnotherLibrary(torch.nn.Module):
    """Such as diffusers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def save_pretrained(self, folder: str) -> None:
        raise AssertionError("never called once weights are packed")


def test_other_libraries_do_not_save_what_they_do_not_know() -> None:
    model = OfAnotherLibrary()
    bitfold.quantize_(model, "int8")
    with pytest.raises(UsageError, match="packed weights"):
        model.save_pretrained("x")


PUSH = """
import bitfold
from bitfold.integrations.transformers import BitfoldConfig
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, quantization_config=BitfoldConfig(bits=8))
model.push_to_hub("alice/pushed")
again = AutoModelForCausalLM.from_pretrained("alice/pushed")
assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
print(type(again.model.layers[0].mlp.up_proj).__name__)
"""


def test_push_to_hub(plain: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    with HubServer() as hub:
        environment |= {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_good", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        command = [sys.executable, "-c", "import torch" + PUSH.format(folder=str(plain))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == "QLinear"


def test_configs_are_json(plain: Path) -> None:
    rules = bitfold.Recipe((bitfold.Rule("*", "int8"),))
    for config in (config_of(bits=4, ignore=["a"]), config_of(recipe=rules), config_of(recipe=Path("a.toml"))):
        assert json.loads(config.to_json_string())["quant_method"] == "bitfold"
