"""Mixtures of experts as GGUF files: stacks of experts, whoever has them one by one; written, read back, repacked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_lm
from bitfold import Calibration, quantize
from bitfold.checkpoints import convert, open_source
from bitfold.checkpoints.gguf.file import GgufFile
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.checkpoints.repack import repack
from bitfold.checkpoints.targets import open_target
from bitfold.errors import CheckpointError, UsageError
from bitfold.run.options import OnTensor
from gguf_families import MIXTURES, SIZES, logits, random_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = {"mixtral": "block_sparse_moe.experts.{}.w1", "qwen3moe": "mlp.experts.{}.gate_proj"}


@pytest.fixture(scope="module", params=MIXTURES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A random model of each family, its name and its folder."""
    model_type, options = MIXTURES[request.param]
    model, place = random_model(model_type, options), tmp_path_factory.mktemp("mixture")
    model.save_pretrained(place / "hf")
    return request.param, model, place / "hf"


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = GgufFile(path)
    try:
        return {name: (t.type, t.shape, bytes(file.raw(t))) for name, t in file.tensors.items()}
    finally:
        file.close()


def test_same_logits_from_the_file(family: tuple[str, Any, Path], tmp_path: Path) -> None:
    """Through the file into a plain folder, which transformers loads by its own rules."""
    _, model, folder = family
    file = repack(folder, tmp_path / "m.gguf", "gguf:F32")
    assert not file.losses
    again = transformers.AutoModelForCausalLM.from_pretrained(
        convert(file.path, tmp_path / "again", "float32"), attn_implementation="eager"
    )
    expected, found = logits(model), logits(again)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for key in ("num_experts_per_tok", "hidden_size", "intermediate_size", "rope_parameters", "sliding_window"):
        assert getattr(again.config, key) == getattr(model.config, key), key


def test_names_and_shapes_are_those_of_the_gguf_package(family: tuple[str, Any, Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package (dev extra) has llama.cpp's names")
    name, _, folder = family
    reader = gguf.GGUFReader(repack(folder, tmp_path / "m.gguf", "gguf:F32").path)
    arch = str(reader.fields["general.architecture"].contents())
    number = next(key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == arch)
    names = gguf.get_tensor_name_map(number, SIZES["num_hidden_layers"])
    merged = {re.sub(r"experts\.\d+", "experts", tensor) for tensor in open_source(folder).names()}
    assert {t.name for t in reader.tensors} == {names.get_name(n, (".weight", ".bias")) for n in merged}
    shapes = {t.name: tuple(int(size) for size in t.shape) for t in reader.tensors}
    width = 64 if name == "mixtral" else 32
    assert shapes["blk.1.ffn_gate_exps.weight"] == (48, width, 4)
    assert shapes["blk.1.ffn_down_exps.weight"] == (width, 48, 4)
    assert tensors(tmp_path / "m.gguf")["blk.0.ffn_gate_inp.weight"][0] == "f32"


def test_experts_lie_in_their_order(family: tuple[str, Any, Path], tmp_path: Path) -> None:
    """Each expert's blocks are those of the expert by itself, and come back so, row by row as well."""
    name, _, folder = family
    path = repack(folder, tmp_path / "m.gguf", "gguf:Q4_0").path if name == "mixtral" else None
    path = path or repack(folder, tmp_path / "m.gguf", "gguf:F16").path
    source, original = GgufSource(path), open_source(folder)
    assert set(source.names()) == set(original.names())
    for i in range(4):
        tensor = f"model.layers.1.{EXPERTS[name].format(i)}.weight"
        w, was = source.read(tensor).float(), original.read(tensor)
        assert float((w - was).square().sum() / was.square().sum()) < 0.02
        assert torch.equal(source.read_rows(tensor, torch.tensor([1, 5])).float(), w[[1, 5]])
    assert sum(source.stored_bytes().values()) == source.data_bytes()
    source.close()


def test_files_and_folders_hold_the_same_blocks(tmp_path: Path) -> None:
    """GGUF -> bitfold folder -> GGUF: the same bytes in every tensor."""
    options = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
    random_model("mixtral", options).save_pretrained(tmp_path / "hf")
    first = repack(tmp_path / "hf", tmp_path / "a.gguf", "gguf:Q5_1").path
    folder = repack(first, tmp_path / "q", "bitfold")
    again = repack(folder.path, tmp_path / "b.gguf", "gguf", max_shard_bytes=40_000)
    assert (folder.losses, again.losses) == ({}, {})
    merged: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for path in sorted(tmp_path.glob("b-*.gguf")):
        merged |= tensors(path)
    assert merged == tensors(first)
    assert tensors(first)["blk.0.ffn_up_exps.weight"][:2] == ("q5_1", (3, 64, 64))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["rtn", "ldlq"])
def test_calibrated_experts(tmp_path: Path, method: str) -> None:
    """`quantize --export`: the model class has gate and up in one stack, the file in two; a run can be gone on with."""
    config = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "eos_token_id": 256,
    }
    model = random_model("mixtral", {**config, "num_experts_per_tok": 2, "pad_token_id": 256, "bos_token_id": None})
    folder = tiny_lm.folder(tmp_path / "hf", model)
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")

    def run(name: str, on_tensor: OnTensor | None = None) -> Path:
        text = None if method == "rtn" else Calibration(str(folder / "text.txt"), nsamples=6, seqlen=64, fisher=False)
        how: dict[str, Any] = {"method": method, "calibration": text, "on_tensor": on_tensor}
        report = quantize(folder, tmp_path / name, export="gguf:Q4_1", **how)
        return Path(str(report.output))

    def stop(report: Any) -> None:
        if report.tensor.endswith("layers.1.mlp.experts.gate_up_proj"):
            raise Stopped

    whole = run("a.gguf")
    rounded = repack(folder, tmp_path / "r.gguf", "gguf:Q4_1").path
    held, plain = tensors(whole), tensors(rounded)
    assert {n: t[:2] for n, t in held.items()} == {n: t[:2] for n, t in plain.items()}
    assert (held == plain) == (method == "rtn")
    source, original = GgufSource(whole), open_source(folder)
    for expert in range(4):
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            w, was = source.read(name), original.read(name)
            assert float((w - was).square().sum() / was.square().sum()) < 0.03
    source.close()
    with pytest.raises(Stopped):
        run("b.gguf", stop)
    assert run("b.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", MIXTURES)
def test_types_are_chosen_for_a_size(tmp_path: Path, name: str) -> None:
    """A stack of gates and ups is one choice and two tensors; what no token is sent to costs nothing."""
    model_type, options = MIXTURES[name]
    words: dict[str, Any] = {
        "vocab_size": 257,
        "eos_token_id": 256,
        "pad_token_id": 256,
        "bos_token_id": None,
        "hidden_size": 64,
    }
    if name == "qwen3moe":
        words["moe_intermediate_size"] = 64
    folder = tiny_lm.folder(tmp_path / "hf", random_model(model_type, {**options, **words}))
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    text = Calibration(str(folder / "text.txt"), nsamples=4, seqlen=64, fisher=False)
    losses, sizes = [], (140_000, 170_000)
    for size in sizes:
        said: dict[str, Any] = {"export": "gguf:auto", "target_bytes": size, "calibration": text}
        report = quantize(folder, tmp_path / f"{size}.gguf", **said)
        file = Path(str(report.output))
        assert 0.9 * size < file.stat().st_size <= size
        held = tensors(file)
        for layer in range(2):
            gate, up = (held[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up"))
            assert gate[:2] == up[:2]
        reckoned = re.search(r"rounding to nearest: (\S+) nats", report.method)
        assert reckoned is not None
        losses.append(float(reckoned[1]))
    assert losses[1] < losses[0]
    assert len({kind for kind, shape, _ in held.values() if len(shape) > 1}) > 1


CHANGES: list[dict[str, Any]] = [{"norm_topk_prob": False}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_mixtures_that_gguf_has_no_words_for(change: dict[str, Any], tmp_path: Path) -> None:
    model_type, options = MIXTURES["qwen3moe"]
    random_model(model_type, options).save_pretrained(tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    source.config |= change
    with pytest.raises(CheckpointError, match="no word for"):
        open_target("gguf", tmp_path, None, source)


def test_what_mixtures_cannot_do(family: tuple[str, Any, Path], tmp_path: Path) -> None:
    """Noise comes in the order of whole tensors: told in words."""
    _, _, folder = family
    file = repack(folder, tmp_path / "m.gguf", "gguf:F16")
    with pytest.raises(UsageError, match="cannot be dithered"):
        GgufSource(file.path, dither_seed=1)


@pytest.mark.parametrize("count", [0, 3, 5, 2**31])
def test_counts_of_experts_that_are_wrong(family: tuple[str, Any, Path], tmp_path: Path, count: int) -> None:
    """The announced number is held against the stacks, before anything is made for it."""
    name, _, folder = family
    path = repack(folder, tmp_path / "m.gguf", "gguf:F16").path
    key = ("llama" if name == "mixtral" else "qwen3moe").encode() + b".expert_count\x04\x00\x00\x00"
    raw = path.read_bytes()
    at = raw.index(key) + len(key)
    path.write_bytes(raw[:at] + count.to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(CheckpointError):
        GgufSource(path)
