"""Models without transformers' classes: the same numbers, and nothing guessed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_lm
from bitfold.checkpoints.gguf.file import GgufFile
from bitfold.engine import Sampling, Writer, bare
from bitfold.engine.decoder import Decoder
from bitfold.engine.families import FAMILIES
from bitfold.engine.opening import load_model, open_model
from bitfold.models.model_ref import ModelRef
from bitfold.models.save import save
from bitfold.models.swap import quantize_
from bitfold.recipes.recipe import Recipe
from bitfold.system import native, progress
from gguf_files import converted, metadata_of, write_gguf
from small_decoders import CONFIGS, build, ids_of

pytestmark = pytest.mark.skipif(native.core() is None, reason="the engine is native")

DENSE = sorted(name for name, config in CONFIGS.items() if "moe" not in name and name != "mixtral")


def folder_of(path: Path, name: str, *, quantized: bool = False) -> Path:
    model = build(name)
    if quantized:
        quantize_(model, Recipe.of("int4-asym-g32"))
        save(model, path)
    else:
        model.save_pretrained(path)
    return path


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int4"])
@pytest.mark.parametrize("name", DENSE)
def test_bare_models_give_the_logits_of_transformers_own(name, quantized, tmp_path):
    folder = folder_of(tmp_path / "m", name, quantized=quantized)
    found = load_model(ModelRef.of(folder), None)
    whole = ModelRef.of(folder).load("AutoModelForCausalLM", None)
    assert isinstance(found, bare.Bare)
    assert type(found).__name__ == type(whole).__name__
    ids = ids_of(90)
    ours, theirs = (Decoder(model, 128).logits(ids) for model in (found, whole))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_what_a_config_does_not_say_is_left_to_transformers(name, tmp_path):
    """Without a number, and with one in words that are not known: nothing is guessed."""
    config = json.loads((folder_of(tmp_path / "m", name) / "config.json").read_text())
    family = FAMILIES[config["architectures"][0]]
    assert bare.build(config, None) is not None
    for key in (*bare.NEEDED, *family.needs):
        assert bare.build({k: v for k, v in config.items() if k != key}, None) is None, key
    strange: list[dict[str, Any]] = [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "gpt2"},
        {"architectures": ["GPT2LMHeadModel"]},
        {"num_hidden_layers": 10**9},
        {"vocab_size": "many"},
        {"layer_types": ["chunked_attention"] * 3},
    ]
    for change in strange:
        assert bare.build({**config, **change}, None) is None, change


def test_old_configs_mean_what_they_meant(tmp_path):
    """`rope_theta` and `rope_scaling` beside each other, no head size, no word on ties, as transformers 4 wrote it."""
    folder = folder_of(tmp_path / "m", "llama-scaled")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    del config["head_dim"]
    file.write_text(json.dumps(config))
    found, whole = load_model(ModelRef.of(folder), None), ModelRef.of(folder).load("AutoModelForCausalLM", None)
    assert isinstance(found, bare.Bare)
    ids = ids_of(90)
    assert torch.allclose(Decoder(found, 128).logits(ids), Decoder(whole, 128).logits(ids), rtol=1e-5, atol=1e-5)


def test_tensors_of_other_names_are_left_to_transformers(tmp_path):
    """A checkpoint with a bias more, or with its tied head written out, is not the family as it is known."""
    for name, extra, shape in (
        ("llama-scaled", "lm_head.weight", (300, 64)),
        ("qwen2", "model.layers.0.mlp.up_proj.bias", (96,)),
    ):
        folder = folder_of(tmp_path / name, name)
        file = folder / "model.safetensors"
        save_file({**load_file(file), extra: torch.zeros(shape)}, file)
        assert not isinstance(load_model(ModelRef.of(folder), None), bare.Bare)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    model: Any = tiny_lm.model()
    tokens = sorted(tiny_lm.tokenizer().get_vocab().items(), key=lambda item: item[1])
    metadata = {
        **metadata_of(model.config, "llama", **{"rope.dimension_count": 16}),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": ["Q Q"],
        "tokenizer.ggml.eos_token_id": 256,
    }
    tensors = converted(model.state_dict(), "llama", 4, 2)
    types = {name: "q8_0" for name, w in tensors.items() if w.ndim == 2}
    return write_gguf(tmp_path / "tiny.gguf", "llama", tensors, metadata, types)


def test_a_gguf_file_is_opened_once(gguf, monkeypatch):
    opened: list[Any] = []
    make = GgufFile.__init__
    monkeypatch.setattr(GgufFile, "__init__", lambda self, path: (opened.append(path), make(self, path))[1])
    assert Writer.open(gguf).write("the quick", Sampling(3)).tokens == 3
    assert len(opened) == 1


HEAVY = ("transformers", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "pandas")


@pytest.mark.parametrize("kind", ["gguf", "folder", "int4"])
def test_writing_imports_nothing_heavy(kind, gguf, tmp_path):
    """Their import takes longer than a small model to answer."""
    model: Any = tiny_lm.model()
    path = gguf
    if kind == "int4":
        path = tmp_path / "m"
        quantize_(model, Recipe.of("int4-asym-g32"))
        save(model, path)
        tiny_lm.tokenizer().save_pretrained(path)
    elif kind == "folder":
        path = tiny_lm.folder(tmp_path / "m", model)
    program = f"""
import sys
from typer.testing import CliRunner
from bitfold.cli import app
result = CliRunner().invoke(app, ["generate", {str(path)!r}, "-p", "the quick", "--max-new-tokens", "3"])
assert result.exit_code == 0, result.output
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_the_engine_has_no_code_for_is_written_by_transformers(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    made: Any = tiny_lm.model()
    made.config.hidden_act = "relu"
    folder = tiny_lm.folder(tmp_path / "m", made)
    writer = Writer.open(folder)
    assert isinstance(writer.running, bare.Bare)
    assert writer.write("the quick", Sampling(3)).tokens == 3
    assert writer.running is writer.model
    assert any("transformers' own loop" in line for line in said)


def test_a_generation_config_beyond_the_sampler_is_read_by_transformers(tmp_path):
    folder = tiny_lm.folder(tmp_path / "m", tiny_lm.model())
    file = folder / "generation_config.json"
    for more, kind in (({}, "Settings"), ({"no_repeat_ngram_size": 2}, "GenerationConfig")):
        file.write_text(json.dumps({"eos_token_id": [256, 7], **more}))
        found: Any = open_model(ModelRef.of(folder), None).model
        assert isinstance(found, bare.Bare)
        assert type(found.generation_config).__name__ == kind
        assert found.generation_config.eos_token_id == [256, 7]
        assert found.generation_config.pad_token_id is None


def test_the_model_of_a_writer_is_transformers_own_and_its_settings_hold(tmp_path):
    writer = Writer.open(tiny_lm.folder(tmp_path / "m", tiny_lm.model()))
    text = writer.write("the quick", Sampling(4)).text
    assert isinstance(writer.running, bare.Bare)
    model: Any = writer.model
    assert type(model).__module__.startswith("transformers.")
    assert writer.write("the quick", Sampling(4)).text == text
    model.generation_config.eos_token_id = list(range(257))
    assert writer.write("the quick", Sampling(4)).tokens == 1
