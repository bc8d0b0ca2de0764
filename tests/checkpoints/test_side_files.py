"""What is carried over beside the weights, and which files are the weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import bitfold
from bitfold.checkpoints import convert, open_source
from bitfold.checkpoints.manifest import verify
from bitfold.checkpoints.side_files import is_weights, module_folders, side_files
from bitfold.errors import CheckpointError

MODULES = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../up"}])
CARRIED = {
    "tokenizer.json": b"{}", "vocab.txt": b"a", "merges.txt": b"a", "spiece.model": b"\x0a\x0d", "tekken.json": b"{}",
    "qwen.tiktoken": b"IQ== 0", "LICENSE": b"x", "NOTICE.md": b"x", "preprocessor_config.json": b"{}", "dict.bpe": b"x",
    "generation_config.json": b"{}", "chat_template.jinja": b"x", "mel_filters.npz": b"\x00npz",
    "modules.json": MODULES.encode(),
    "additional_chat_templates/tool_use.jinja": b"x", "1_Pooling/config.json": b"{}", "2_Normalize/config.json": b"{}",
    "2_Dense/config.json": b"{}", "2_Dense/model.safetensors": b"weights of the model",
    "language_model/unigrams.txt": b"x",
    "language_model/5gram.bin": b"mmap lm http://kheafield.com/code format version 5",
}  # fmt: skip
LEFT = {
    "pytorch_model.bin": b"x", "training_args.bin": b"PK\x03\x04", "odd.bin": b"\x80\x02}", "optimizer.pt": b"x",
    "consolidated.00.pth": b"x", "model.gguf": b"GGUF", "model.safetensors.index.fp16.json": b"{}",
    ".gitattributes": b"x", "bitfold_manifest.json": b"{}", "__pycache__/x.pyc": b"x", "README.md": b"old",
    "onnx/model.onnx": b"x", "onnx/config.json": b"{}", "original/params.json": b"{}",
    "original/consolidated.00.pth": b"x",
    "checkpoint-5/config.json": b"{}", "checkpoint-5/model.safetensors": b"x", "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"x", "ref/adapter_config.json": b"{}", "ref/notes.txt": b"x", ".cache/a/b.txt": b"x",
    "runs/events.out.tfevents.1": b"x",
}  # fmt: skip


def model(folder: Path) -> Path:
    """A random Llama in one file."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_the_model_is_carried_over_whole(command: str, tmp_path: Path) -> None:
    """Folders and vocabularies of any kind, byte for byte; no weights, and nothing that needs weights left behind."""
    source, out = model(tmp_path / "m"), tmp_path / "out"
    own = names(source)
    write(source, {**CARRIED, **LEFT})
    commands = {"quantize": lambda: bitfold.quantize(source, out, bits=8), "convert": lambda: convert(source, out)}
    with pytest.warns(UserWarning, match="not read: consolidated"):
        commands[command]()
    made = names(out)
    assert set(CARRIED) <= made
    assert not made & (set(LEFT) - {"README.md", "bitfold_manifest.json"})
    assert all((out / name).read_bytes() == content for name, content in CARRIED.items())
    assert made <= {*CARRIED, *own, "README.md", "bitfold_manifest.json", "bitfold_report.json"}
    if command == "quantize":
        assert not verify(out).problems
        (out / "1_Pooling/config.json").write_bytes(b"[]")
        assert any("1_Pooling/config.json" in problem for problem in verify(out).problems)
    AutoModelForCausalLM.from_pretrained(out)


def test_converted_folders_have_no_manifest_of_another(tmp_path: Path) -> None:
    bitfold.quantize(model(tmp_path / "m"), tmp_path / "q", bits=8)
    convert(tmp_path / "q", tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("bitfold_*"))


def test_names_of_weights() -> None:
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.npz", "model.safetensors", "a.gguf"):
        assert is_weights(name), name
    for name in ("5gram.bin", "mel_filters.npz", "spiece.model", "model_card.md", "vocab.index.json", "models.txt"):
        assert not is_weights(name), name


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '[{"path": "a/b"}]', '[{"path": ".."}]', "[" * 5000])
def test_odd_lists_of_modules(text: str) -> None:
    """Nothing outside the folder is ever a module."""
    assert [name for name in module_folders(text) if ".." in name or "/" in name] == [] or text == '[{"path": ".."}]'
    assert side_files(["a.txt"], module_folders(text)) == ["a.txt"]


def shards(folder: Path, count: int = 2) -> None:
    """Another set of weights, in shards with an index: the same names, all zeros."""
    tensors = {name: torch.zeros_like(w) for name, w in load_file(folder / "model.safetensors").items()}
    where = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: w for j, (name, w) in enumerate(tensors.items()) if j % count == i}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _embedding(folder: Path) -> torch.Tensor:
    return open_source(folder).read("model.embed_tokens.weight").float()


@pytest.mark.parametrize("rival", ["shards", "consolidated", "variant", "pickle", "adapter", "folder"])
def test_what_transformers_takes_is_taken(rival: str, tmp_path: Path) -> None:
    """Where two files could be the weights; one line says so, if the other may be a model's."""
    source = model(tmp_path / "m")
    other = {name: torch.zeros_like(w) for name, w in load_file(source / "model.safetensors").items()}
    if rival == "shards":
        shards(source)
    elif rival == "pickle":
        (source / "pytorch_model.bin").write_bytes(b"\x80")
    else:
        places = {"consolidated": "consolidated.safetensors", "variant": "model.fp16.safetensors"}
        places |= {"adapter": "adapter_model.safetensors", "folder": "unet/model.safetensors"}
        (source / places[rival]).parent.mkdir(exist_ok=True)
        save_file(other, source / places[rival], {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight.float()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(_embedding(source), theirs)
    assert len(said) == (rival not in ("adapter", "folder"))
    assert all(
        "as transformers would take them" in str(line.message) and "\n" not in str(line.message) for line in said
    )


def test_shards_alone(tmp_path: Path) -> None:
    """By their index; without one they are one set, if all are there."""
    source = model(tmp_path / "m")
    shards(source)
    (source / "model.safetensors").unlink()
    assert not _embedding(source).any()
    (source / "model.safetensors.index.json").unlink()
    assert not _embedding(source).any()
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards"):
        open_source(source)


REFUSED = {
    "several sets": (["model.fp16.safetensors", "model-00001-of-00001.safetensors"], "several sets of weights"),
    "adapter": (["adapter_model.safetensors"], "an adapter, not a model"),
    "consolidated": (["consolidated.safetensors"], "another library"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_no_set_of_weights(kind: str, tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    for name in REFUSED[kind][0]:
        (source / name).write_bytes(weights)
    with pytest.raises(CheckpointError, match=REFUSED[kind][1]):
        open_source(source)


def test_weights_that_the_config_names(tmp_path: Path) -> None:
    """`transformers_weights`, which must lie in the folder."""
    source = model(tmp_path / "m")
    (source / "model.safetensors").rename(source / "special.safetensors")
    config = json.loads((source / "config.json").read_text())
    for name, fine in (("special.safetensors", True), ("../m/special.safetensors", False), ("none.safetensors", False)):
        (source / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        if fine:
            assert _embedding(source).any()
        else:
            with pytest.raises(CheckpointError, match=r"special|none"):
                open_source(source)
