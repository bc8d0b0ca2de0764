"""GGUF files: what a sound one means, and that no damaged one gets through."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitfold.checkpoints import convert, open_source
from bitfold.checkpoints.gguf.file import GGML_TYPES, GgufFile
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.errors import CheckpointError, UsageError
from gguf_files import LLAMA, llama_tensors, write_gguf

gguf = pytest.importorskip("gguf", reason="the gguf package (dev extra) writes the files")

TYPES = {"blk.0.attn_q.weight": "q4_1", "blk.0.ffn_up.weight": "q8_0", "blk.0.ffn_down.weight": "f16"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound little file with several tensor types."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, "llama", llama_tensors(), LLAMA, TYPES)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, type_id: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + value


def tensor(name: str, dims: list[int], type_id: int, offset: int) -> bytes:
    head = string(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
    return head + struct.pack("<IQ", type_id, offset)


def assemble(entries=(), tensors=(), data=b"", version=3, counts=None) -> bytes:
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    raw = b"GGUF" + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join(entries) + b"".join(tensors)
    return raw + b"\0" * (-len(raw) % 32) + data


def opened(tmp_path: Path, raw: bytes) -> GgufFile:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    return GgufFile(path)


def test_metadata_of_every_type(tmp_path: Path):
    scalars = {0: ("B", 250), 1: ("b", -5), 2: ("H", 65000), 3: ("h", -300), 4: ("I", 1 << 31), 5: ("i", -7)}
    scalars |= {6: ("f", 0.1), 7: ("?", True), 10: ("Q", 1 << 60), 11: ("q", -(1 << 60)), 12: ("d", 0.1)}
    entries = [entry(f"k{t}", t, struct.pack(f"<{code}", value)) for t, (code, value) in scalars.items()]
    entries.append(entry("text", 8, string("grün ▁")))
    entries.append(entry("numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)))
    entries.append(entry("flags", 9, struct.pack("<IQ2B", 7, 2, 1, 0)))
    entries.append(entry("texts", 9, struct.pack("<IQ", 8, 2) + string("a") + string("")))
    entries.append(entry("nested", 9, struct.pack("<IQ", 9, 2) + struct.pack("<IQB", 0, 1, 9) * 2))
    file = opened(tmp_path, assemble(entries))
    expected = {f"k{t}": value for t, (_, value) in scalars.items()}  # 0.1 as float32 comes back as 0.1
    expected |= {"text": "grün ▁", "numbers": [1, -2, 3], "flags": [True, False], "texts": ["a", ""]}
    assert file.metadata == {**expected, "nested": [[9], [9]]}
    file.close()


def test_version_2_and_other_alignments(tmp_path: Path):
    w = {"a": np.arange(3, dtype=np.float32), "b": np.arange(7, dtype=np.float32)}
    path = write_gguf(tmp_path / "aligned.gguf", "llama", w, alignment=128)
    path.write_bytes(b"GGUF\x02" + path.read_bytes()[5:])
    file = GgufFile(path)
    assert all(t.start % 128 == 0 for t in file.tensors.values())
    assert np.frombuffer(file.raw(file.tensors["b"]), "<f4").tolist() == w["b"].tolist()
    file.close()


def test_tensor_types_are_the_reference_s():
    sizes = {int(t): s for t, s in gguf.constants.GGML_QUANT_SIZES.items()}
    for type_id, (name, *size) in GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(type_id).name.lower() == name.removeprefix("ggml_")
        assert tuple(size) == sizes[type_id]


F32 = 0
HOSTILE = {
    "empty": (b"", "empty"),
    "not gguf": (b"PK\x03\x04" + b"\0" * 60, "not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (assemble(version=1), "version 1"),
    "header cut": (assemble()[:20], "truncated"),
    "2**60 tensors": (assemble(counts=(1 << 60, 0)), "more than the file can hold"),
    "2**60 entries": (assemble(counts=(0, 1 << 60)), "more than the file can hold"),
    "huge key": (assemble([struct.pack("<Q", 1 << 62) + b"x" * 30]), "truncated"),
    "huge string": (assemble([entry("k", 8, struct.pack("<Q", 1 << 40))]), "truncated"),
    "huge array": (assemble([entry("k", 9, struct.pack("<IQ", 12, 1 << 50))]), "truncated"),
    "huge string array": (assemble([entry("k", 9, struct.pack("<IQ", 8, 1 << 50))]), "announces"),
    "string array cut": (
        assemble([entry("k", 9, struct.pack("<IQ", 8, 2) + string("a") + b"\xff" * 8)]),
        "past the end",
    ),
    "deep arrays": (assemble([entry("k", 9, struct.pack("<IQ", 9, 1) * 30)]), "deep"),
    "unknown value type": (assemble([entry("k", 77, b"\0" * 16)]), "unknown type 77"),
    "not UTF-8": (assemble([entry("k", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "UTF-8"),
    "double key": (assemble([entry("k", 0, b"\1"), entry("k", 0, b"\2")]), "twice"),
    "odd alignment": (assemble([entry("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
    "zero alignment": (assemble([entry("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "five dimensions": (assemble((), [tensor("t", [1] * 5, F32, 0)], b"\0" * 64), "'t'.*5 dimensions"),
    "zero rows": (assemble((), [tensor("t", [4, 0], F32, 0)], b"\0" * 64), "'t'.*cannot be"),
    "broken block": (assemble((), [tensor("t", [33], 2, 0)], b"\0" * 64), "'t'.*blocks of 32"),
    "unknown type": (assemble((), [tensor("t", [4], 999, 0)], b"\0" * 64), "'t'.*type 999"),
    "out of range": (assemble((), [tensor("t", [4], F32, 64)], b"\0" * 64), "'t'.*truncated"),
    "product overflow": (assemble((), [tensor("t", [1 << 62, 1 << 62], F32, 0)], b"\0" * 64), "'t'.*truncated"),
    "not aligned": (assemble((), [tensor("t", [4], F32, 8)], b"\0" * 64), "'t'.*alignment"),
    "same name": (assemble((), [tensor("t", [4], F32, 0), tensor("t", [4], F32, 32)], b"\0" * 64), "'t'.*twice"),
    "overlap": (assemble((), [tensor("a", [16], F32, 0), tensor("b", [4], F32, 32)], b"\0" * 64), "'b'.*overlaps 'a'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(case: str, tmp_path: Path):
    raw, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, raw)
    assert "hostile.gguf" in str(caught.value)


def test_missing_file_is_our_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf"):
        GgufFile(tmp_path / "nowhere.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3))
def test_any_damage_gives_our_error_or_sound_tensors(llama: Path, tmp_path: Path, cut: float, flips: list):
    raw = bytearray(llama.read_bytes())
    header = len(raw) // 3
    for where, mask in flips:
        raw[int(where * (header - 1))] ^= mask
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw[: int(len(raw) * cut)] if cut < 0.9 else raw)
    refusal = None
    try:
        source = GgufSource(path)
        for name in source.names():
            assert tuple(source.read(name).shape) == source.info(name).shape
        source.close()
    except CheckpointError as error:
        refusal = str(error)
    assert refusal is None or "damaged.gguf" in refusal


def test_every_truncation_is_refused(llama: Path, tmp_path: Path):
    raw = llama.read_bytes()
    for size in {*range(0, 400, 7), *range(400, len(raw) - 32, 997)}:
        with pytest.raises(CheckpointError):
            opened(tmp_path, raw[:size])


def test_reads_types_and_undoes_the_permutation(llama: Path):
    source, stored = GgufSource(llama), llama_tensors()
    assert source.ggml_type("model.layers.0.self_attn.q_proj.weight") == "q4_1"
    assert source.info("model.layers.0.mlp.down_proj.weight").dtype == torch.float16
    assert source.config["tie_word_embeddings"] is True
    assert source.config["num_key_value_heads"] == 1
    up = source.read("model.layers.0.mlp.up_proj.weight")
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(stored["blk.0.ffn_up.weight"], q8), q8)
    assert np.array_equal(up.numpy(), expected)
    k = source.read("model.layers.0.self_attn.k_proj.weight")
    pairs = torch.from_numpy(stored["blk.0.attn_k.weight"])  # one head of 16: row 2i + h belongs to half h
    assert torch.equal(k, torch.cat([pairs[0::2], pairs[1::2]]))
    assert source.steps("model.embed_tokens.weight") is None
    source.close()


@pytest.mark.parametrize("dither", [None, 5])
def test_rows_are_those_of_the_whole(llama: Path, dither: int | None):
    """Of every matrix, in the order that was asked for, interleaved or not, block types or plain."""
    source = GgufSource(llama, dither)
    for name in source.names():
        whole = source.read(name)
        if whole.dim() > 1:
            rows = torch.tensor([0, 1, 2, len(whole) - 1, 5])
            assert torch.equal(source.read_rows(name, rows), whole[rows]), name
            assert torch.equal(source.read_rows(name, torch.arange(len(whole))), whole), name
    source.close()


def test_tensors_outlive_the_file(llama: Path):
    source = GgufSource(llama)
    w = source.read("model.embed_tokens.weight")
    source.close()
    assert np.array_equal(w.numpy(), llama_tensors()["token_embd.weight"])


def test_dither_stays_inside_the_steps_and_does_not_depend_on_order(llama: Path):
    plain, first, second = GgufSource(llama), GgufSource(llama, 7), GgufSource(llama, 7)
    a = {name: first.read(name) for name in first.names()}
    b = {name: second.read(name) for name in reversed(second.names())}
    for name, w in a.items():
        assert torch.equal(w, b[name])
        difference, steps = w - plain.read(name), plain.steps(name)
        if steps is None:
            assert not difference.any()
        elif "q_proj" not in name:  # steps are in the row order of the file
            assert (difference.abs() <= steps / 2 * 1.001).all()
            assert (difference / steps).std() == pytest.approx(12**-0.5, rel=0.1)
    other = GgufSource(llama, 8)
    assert not torch.equal(other.read("model.layers.0.mlp.up_proj.weight"), a["model.layers.0.mlp.up_proj.weight"])


def test_models_that_cannot_be_read_say_what_can(tmp_path: Path):
    tensors = llama_tensors()
    unknown = write_gguf(tmp_path / "a.gguf", "mamba", tensors)
    with pytest.raises(CheckpointError, match=r"'mamba'.*llama, qwen2"):
        GgufSource(unknown)
    qwen = {key.replace("llama", "qwen2"): value for key, value in LLAMA.items()}
    experts = write_gguf(tmp_path / "b.gguf", "qwen2", tensors, {**qwen, "qwen2.expert_count": 8})
    with pytest.raises(CheckpointError, match=r"mixtures of experts of GGUF architecture 'qwen2'.*qwen3moe"):
        GgufSource(experts)
    extra = write_gguf(tmp_path / "c.gguf", "llama", {**tensors, "blk.0.ssm_a.weight": np.ones(4, np.float32)}, LLAMA)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a\.weight.*no such tensor"):
        GgufSource(extra)
    layers = write_gguf(tmp_path / "d.gguf", "llama", tensors, {**LLAMA, "llama.block_count": 2})
    with pytest.raises(CheckpointError, match=r"missing.*model\.layers\.1"):
        GgufSource(layers)
    endless = write_gguf(tmp_path / "g.gguf", "llama", tensors, {**LLAMA, "llama.block_count": 2**31})
    with pytest.raises(CheckpointError, match=r"2147483648 layers are announced, and there are"):
        GgufSource(endless)
    facts = {k: v for k, v in LLAMA.items() if k != "llama.embedding_length"}
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length is None"):
        GgufSource(write_gguf(tmp_path / "e.gguf", "llama", tensors, facts))
    scaled = write_gguf(tmp_path / "f.gguf", "llama", tensors, {**LLAMA, "llama.rope.scaling.type": "su"})
    with pytest.raises(CheckpointError, match="'su'"):
        GgufSource(scaled)


def test_undecodable_types_are_named_before_anything_is_written(llama: Path, tmp_path: Path):
    raw = llama.read_bytes()
    at = raw.index(string("blk.0.ffn_up.weight")) + 8 + len("blk.0.ffn_up.weight") + 4 + 16
    path = tmp_path / "q8_1.gguf"  # 64 x 32 weights: Q8_1 has blocks of 40 bytes, I8 takes one byte each
    path.write_bytes(raw[:at] + struct.pack("<I", 24) + raw[at + 4 :])
    with pytest.raises(CheckpointError, match=r"ffn_up.*type i8 cannot be decoded"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_convert_writes_an_ordinary_folder(llama: Path, tmp_path: Path):
    out = convert(llama, tmp_path / "hf", dither_seed=3, max_shard_bytes=10_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert "seed 3" in (out / "README.md").read_text()
    source, folder = GgufSource(llama, 3), open_source(out)
    assert folder.config["dtype"] == "bfloat16"
    assert set(folder.names()) == set(source.names())
    for name in source.names():
        assert torch.equal(folder.read(name), source.read(name).bfloat16())
    with pytest.raises(CheckpointError, match="exists already"):
        convert(llama, out)
    again = convert(out, tmp_path / "again", dtype="auto")
    assert open_source(again).info("model.norm.weight").dtype == torch.bfloat16
    with pytest.raises(UsageError, match="dither"):
        convert(out, tmp_path / "third", dither_seed=1)
    with pytest.raises(UsageError, match="int4"):
        convert(out, tmp_path / "third", dtype="int4")


def test_float16_overflow_is_an_error(tmp_path: Path):
    tensors = llama_tensors()
    tensors["blk.0.ffn_up.weight"][0, 0] = 1e6
    path = write_gguf(tmp_path / "big.gguf", "llama", tensors, LLAMA)
    with pytest.raises(CheckpointError, match=r"up_proj.*float16"):
        convert(path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
