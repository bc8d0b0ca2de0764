"""GGUF files that bitfold writes: what is written is read back, for every architecture, by every reader there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitfold.checkpoints import open_source
from bitfold.checkpoints.gguf.container import Laid, plan_parts
from bitfold.checkpoints.gguf.file import GgufFile
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.checkpoints.repack import repack
from bitfold.checkpoints.shards import PlannedWriter
from bitfold.checkpoints.targets import open_target
from bitfold.errors import CheckpointError, UsageError
from bitfold.formats.families.ggml import GGML, writable
from bitfold.system.tensorinfo import TensorInfo
from gguf_families import MODELS, SIZES, logits, random_model, rebuilt

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")

METADATA = {
    "general.architecture": "llama",
    "a.count": 7,
    "a.far": 2**40,
    "a.below": -3,
    "a.real": 0.1,
    "a.yes": True,
    "a.text": "naïve \U0001f680",
    "a.words": ["", "b", "ç"],
    "a.none": [],
    "a.kinds": [1, -2, 3],
    "a.reals": [0.5, -1.25],
    "a.flags": [True, False],
}


def test_a_container_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {"one": torch.arange(6.0).view(2, 3), "two": torch.arange(5.0).half(), "three": torch.ones(2, 2, 4)}
    kinds = {torch.float32: "f32", torch.float16: "f16"}
    laid = {n: Laid(kinds[w.dtype], tuple(w.shape), TensorInfo(w.dtype, tuple(w.shape))) for n, w in tensors.items()}
    plan = plan_parts("m.gguf", METADATA, laid)
    writer = PlannedWriter(tmp_path, plan)
    for name in reversed(tensors):
        writer.write(name, [tensors[name]])
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata == METADATA
    assert {n: t.shape for n, t in file.tensors.items()} == {n: tuple(w.shape) for n, w in tensors.items()}
    for name, w in tensors.items():
        assert torch.equal(torch.frombuffer(file.raw(file.tensors[name]), dtype=w.dtype).view(w.shape), w)
    assert plan.nbytes == (tmp_path / "m.gguf").stat().st_size
    file.close()


@pytest.mark.parametrize("wrong", [{"a": [1, "b"]}, {"a": None}, {"a": 2**64}], ids=str)
def test_metadata_that_gguf_does_not_know(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="metadata a"):
        plan_parts("m.gguf", wrong, {})


def test_names_that_ggml_cannot_hold() -> None:
    with pytest.raises(CheckpointError, match="no place in GGUF"):
        plan_parts("m.gguf", {}, {"n" * 64: Laid("f32", (1,), TensorInfo(torch.float32, (1,)))})


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A random model of each family, its folder, and the file."""
    _, model_type, options, _ = MODELS[request.param]
    model, place = random_model(model_type, options), tmp_path_factory.mktemp("family")
    model.save_pretrained(place / "hf")
    return model, place / "hf", repack(place / "hf", place / "m.gguf", "gguf:F32").path


def test_same_logits_from_the_file(family: tuple[Any, Path, Path]) -> None:
    """Names, order of rows, norms, config, positions: all of it is undone by the reader."""
    model, _, path = family
    source = GgufSource(path)
    expected, found = logits(model), logits(rebuilt(source))
    # Gemma's norms lose an ulp by + 1 - 1; the others are the same numbers in the same places.
    bound = 1e-3 if source.config["model_type"].startswith("gemma") else 1e-5
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    source.close()


def test_names_are_those_of_the_gguf_package(family: tuple[Any, Path, Path]) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package (dev extra) has llama.cpp's names")
    _, folder, path = family
    reader = gguf.GGUFReader(path)
    arch = str(reader.fields["general.architecture"].contents())
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, SIZES["num_hidden_layers"] + 8)
    wanted = {names.get_name(name, (".weight", ".bias")) for name in open_source(folder).names()}
    assert {t.name for t in reader.tensors} == wanted


def test_what_the_source_says_comes_back(family: tuple[Any, Path, Path]) -> None:
    """The config of the file is that of the model, through the eyes of transformers."""
    model, _, path = family
    source = GgufSource(path)
    again = transformers.AutoConfig.for_model(**source.config)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "tie_word_embeddings"):
        assert getattr(again, key) == getattr(model.config, key), key
    assert getattr(again, "sliding_window", None) == getattr(model.config, "sliding_window", None)
    source.close()


def wide(place: Path) -> Path:
    """A small Llama whose rows take blocks of 256, grouped keys included."""
    options = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    random_model("llama", options).save_pretrained(place)
    return place


def raw(path: Path) -> dict[str, tuple[str, bytes]]:
    file = GgufFile(path)
    try:
        return {name: (t.type, bytes(file.raw(t))) for name, t in file.tensors.items()}
    finally:
        file.close()


@pytest.mark.parametrize("name", [t for t in writable() if t != "ggml_mxfp4"])
def test_codes_go_through_a_folder_unchanged(name: str, tmp_path: Path) -> None:
    """GGUF -> folder -> GGUF, and GGUF -> GGUF: the same bytes in every tensor; the folder has the same numbers."""
    mixture = {"iq2_s": "IQ2_M"}.get(name, name).upper()  # llama.cpp's IQ2_S is mostly of iq2_xs
    first = repack(wide(tmp_path / "hf"), tmp_path / "a.gguf", f"gguf:{mixture}")
    assert first.losses
    folder = repack(first.path, tmp_path / "q", "bitfold")
    again = repack(folder.path, tmp_path / "b.gguf", "gguf")
    third = repack(again.path, tmp_path / "c.gguf", f"gguf:{mixture}")
    assert raw(first.path) == raw(again.path) == raw(third.path)
    assert (folder.losses, again.losses, third.losses) == ({}, {}, {})
    a, b = open_source(first.path), open_source(folder.path)
    assert all(torch.equal(a.read(tensor), b.read(tensor)) for tensor in a.names())
    assert name in {kind for kind, _ in raw(first.path).values()}
    a.close()


def test_rounded_tensors_are_told(tmp_path: Path) -> None:
    folder = wide(tmp_path / "hf")
    exact = repack(folder, tmp_path / "exact.gguf", "gguf")
    assert (exact.losses, exact.exact) == ({}, len(open_source(folder).names()))
    made = repack(folder, tmp_path / "q.gguf", "gguf:Q4_0")
    source, original = open_source(made.path), open_source(folder)
    for name, loss in made.losses.items():
        w, q = original.read(name).double(), source.read(name).double()
        assert loss == pytest.approx(float((w - q).square().sum() / w.square().sum()))
    assert made.nbytes == made.path.stat().st_size
    source.close()


@pytest.mark.parametrize("to", ["gguf:Q9_K", "onnx", "bitfold:q4_k", "gguf:IQ1_S"])
def test_unknown_kinds(to: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown"):
        repack(wide(tmp_path / "hf"), tmp_path / "m.gguf", to)
    assert not (tmp_path / "m.gguf").exists()


def test_outputs_that_are_there(tmp_path: Path) -> None:
    folder = wide(tmp_path / "hf")
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        repack(folder, tmp_path / "m.gguf", "gguf")
    with pytest.raises(CheckpointError, match="is a folder"):
        repack(folder, tmp_path, "gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


CHANGES: list[dict[str, Any]] = [
    {"model_type": "bert"},
    {"hidden_act": "gelu"},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_models_that_gguf_has_no_words_for(change: dict[str, Any], tmp_path: Path) -> None:
    """An error, not a file that is another model."""
    source = open_source(wide(tmp_path / "hf"))
    source.config = {k: v for k, v in source.config.items() if k != "rope_parameters"} | change
    with pytest.raises(CheckpointError, match=r"cannot be written as GGUF|no word for"):
        open_target("gguf", tmp_path, None, source)


def test_tensors_without_a_place(tmp_path: Path) -> None:
    source = open_source(wide(tmp_path / "hf"))
    target = open_target("gguf", tmp_path, None, source)
    with pytest.raises(CheckpointError, match="no place for it"):
        target.layout(
            {"model.embed_tokens.weight": TensorInfo(torch.float32, (97, 256)), "more": source.info("lm_head.weight")}
        )
    with pytest.raises(UsageError, match="made of a checkpoint"):
        open_target("gguf", tmp_path, None)
    assert set(GGML) >= set(writable())
