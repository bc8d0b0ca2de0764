"""A GGUF file is a model and a reference as the folder that it converts to is: the same weights, tokens and numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import bitfold
import tiny_lm
from bitfold.checkpoints import convert
from bitfold.cli import app
from bitfold.engine import Sampling, Writer
from bitfold.errors import CheckpointError
from bitfold.evaluation.comparison import compare
from bitfold.evaluation.layers import layer_errors
from bitfold.evaluation.outliers import find_outliers
from bitfold.models.model_ref import ModelRef
from bitfold.records.record import read_record
from gguf_files import converted, metadata_of, write_gguf

SIZES: dict[str, Any] = {"context": 64, "max_tokens": 512}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama with its tokenizer, in Q8_0 and Q4_0, with a start token and a chat template."""
    model: Any = tiny_lm.model()
    tokens = sorted(tiny_lm.tokenizer().get_vocab().items(), key=lambda item: item[1])
    metadata = {
        **metadata_of(model.config, "llama", **{"rope.dimension_count": 16}),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": ["Q Q"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": tiny_lm.CHAT,
    }
    tensors = converted(model.state_dict(), "llama", 4, 2)
    types = {name: "q4_0" if "attn" in name else "q8_0" for name, w in tensors.items() if w.ndim == 2}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", tensors, metadata, types)


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(file, tmp_path_factory.mktemp("folder") / "tiny", dtype="float32")


def test_it_is_judged_as_the_folder_is(file: Path, folder: Path):
    """The file is read by the engine, with keys and values in half precision: 2^-12 of each."""
    one, other = (bitfold.evaluate(model, text=tiny_lm.TEXT, **SIZES) for model in (file, folder))
    assert one.perplexity == pytest.approx(other.perplexity, rel=2**-12)
    assert one.start_token == other.start_token == "<end>"
    assert one.size == file.stat().st_size
    against = bitfold.evaluate(folder, file, text=tiny_lm.TEXT, **SIZES)
    assert against.kl_mean == pytest.approx(0, abs=1e-5)


def test_it_writes_as_the_folder_does(file: Path, folder: Path):
    for chat in (False, True):
        texts = []
        for model in (file, folder):
            writer = Writer.open(model, dtype="float32", chat=chat)
            texts.append((writer.say if chat else writer.write)("the quick", Sampling(12)).text)
        assert texts[0] == texts[1]
    assert next(ModelRef.of(file).load("AutoModelForCausalLM", None).parameters()).dtype == torch.bfloat16
    assert Writer.open(file).model.generation_config.eos_token_id == 256


def test_its_own_layers_and_those_of_a_folder_against_it(file: Path, folder: Path, tmp_path: Path):
    original = tiny_lm.folder(tmp_path / "original", tiny_lm.model())
    losses = layer_errors(file, original, tiny_lm.TEXT, context=32, max_tokens=64).layers
    by_format = {name: [e for e in losses if e.format == name] for name in ("q4_0", "q8_0")}
    assert [e.bpw for e in by_format["q4_0"]] == [4.5] * 8
    assert all(1e-3 < e.weight_error < 2e-2 and e.output_error for e in by_format["q4_0"])
    assert all(e.weight_error < 1e-4 for e in by_format["q8_0"])
    bitfold.quantize(file, tmp_path / "q8", bits=8)
    losses = layer_errors(tmp_path / "q8", file, tiny_lm.TEXT, context=32, max_tokens=64).layers
    assert max(e.weight_error for e in losses) < 1e-3
    with pytest.raises(CheckpointError, match="holds nothing that is quantized"):
        layer_errors(original, file)


def test_outliers_are_the_folder_s(file: Path, folder: Path):
    """The file runs on its own blocks, with activations in 15 bits: half of 2^-14 of the largest one of a token."""
    one, other = (find_outliers(model, tiny_lm.TEXT, context=32, max_tokens=64) for model in (file, folder))
    assert one.perplexity == pytest.approx(other.perplexity, rel=2**-14)
    assert [w.tensor for w in one.weights] == [w.tensor for w in other.weights]


def test_it_is_compared_and_reported_beside_folders(file: Path, folder: Path, tmp_path: Path):
    own = Path(shutil.copy(file, tmp_path / "own.gguf"))
    bitfold.quantize(folder, tmp_path / "q4", bits=4, method="rtn")
    runs = compare([own, tmp_path / "q4"], folder, tiny_lm.TEXT, **SIZES, save=True).runs
    assert {run.name for run in runs} == {"own.gguf", "q4"}
    assert read_record(own)["evaluations"][0]["kl_mean"] == pytest.approx(0, abs=1e-5)
    arguments = ["report", str(own), "-o", str(tmp_path / "report.html"), "--reference", str(folder), "--context", "64"]
    result = CliRunner().invoke(app, [*arguments, "--max-tokens", "256"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    assert "model.layers.0.self_attn.q_proj.weight" in page
    assert read_record(own)["layers"]["layers"][0]["tensor"].startswith("model.")


def test_what_has_no_place_for_numbers_is_said_before_they_are_measured(file: Path):
    for arguments in (["eval", "org/none", "--save"], ["eval", str(file), "--update-card"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 3, result.output
        assert "on this machine" in result.output


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path):
    model: Any = tiny_lm.model()
    tensors = converted(model.state_dict(), "llama", 4, 2)
    bare = write_gguf(tmp_path / "bare.gguf", "llama", tensors, metadata_of(model.config, "llama"))
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        bitfold.evaluate(bare)
