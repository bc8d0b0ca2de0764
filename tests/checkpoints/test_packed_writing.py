"""Folders for other engines: what is written is read bit for bit, and what they cannot hold is refused before work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bitfold.checkpoints import open_source
from bitfold.checkpoints.headers import read_header
from bitfold.checkpoints.packed import PackedSource
from bitfold.checkpoints.schema import Entry, describe
from bitfold.checkpoints.targets import ENGINES, open_target
from bitfold.errors import CheckpointError
from bitfold.methods.quantize import quantize_tensor
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms import Hadamard
from bitfold.transforms.activations import ACT_SCALE
from packed_files import UP

WEIGHT = f"{UP}.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
HELD = {
    "compressed-tensors": (
        *("int4-g32", "int4-asym-g32", "int2-asym-g64", "int8", "int4", "int4-asym", "int8-g128"),
        *("fp8-e4m3", "fp8-e4m3-tensor", "mxfp4"),
    ),
    "gptq": ("int4-g32", "int4-asym-g32", "int2-g64", "int3-g32", "int3-asym-g32", "int8", "int8-g128"),
    "awq": ("int4-g32", "int4-asym-g32", "int4-asym-g128"),
    "auto-round": ("int4-g32", "int2-g64", "int8", "int3-g32"),
}
CASES = [(kind, form) for kind, forms in HELD.items() for form in forms]


def write(kind: str, path: Path, forms: dict[str, str], act: str = "float") -> dict[str, torch.Tensor]:
    """A folder of that kind with weights (64, 128) of these formats and a plain head; what they decode to."""
    made = {
        name: quantize_tensor(torch.randn(64, 128, generator=torch.Generator().manual_seed(i)), form, fit="minmax")
        for i, (name, form) in enumerate(forms.items())
    }
    entries = {name: Entry(q.format, q.shape, act) for name, q in made.items()}
    head = torch.randn(8, 64).bfloat16()
    path.mkdir()
    target = open_target(kind, path, 1 << 20)
    contents = {**entries, "lm_head.weight": TensorInfo(head.dtype, (8, 64))}
    target.layout(contents)
    for name, q in made.items():
        target.pack(name, q.fields)
    target.write("lm_head.weight", [head])
    target.finish(CONFIG, describe(entries, {}))
    assert target.held() == {name: info.nbytes for name, info in target.stored(contents).items()}
    return {**{name: q.dequantize() for name, q in made.items()}, "lm_head.weight": head}


def settings(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_what_is_written_is_read_bit_for_bit(kind: str, form: str, tmp_path: Path) -> None:
    """By the readers that the golden files of the real programs hold; no byte without a meaning."""
    expected = write(kind, tmp_path / "m", {WEIGHT: form})
    source = open_source(tmp_path / "m")
    assert isinstance(source, PackedSource)
    assert source.program == kind
    assert set(source.names()) == expected.keys()
    assert all(torch.equal(source.read(name), w) for name, w in expected.items())
    assert sum(source.stored_bytes().values()) == source.data_bytes()


def test_several_kinds_of_integers(tmp_path: Path) -> None:
    """A group of modules for each in compressed-tensors, and the head among the ignored; the others have one kind."""
    forms = {WEIGHT: "int4-asym-g32", DOWN: "int8"}
    expected = write("compressed-tensors", tmp_path / "c", forms)
    source = open_source(tmp_path / "c")
    assert all(torch.equal(source.read(name), w) for name, w in expected.items())
    assert settings(tmp_path / "c")["ignore"] == ["lm_head"]
    targets = [group["targets"] for group in settings(tmp_path / "c")["config_groups"].values()]
    assert targets == [[name.removesuffix(".weight")] for name in forms]
    for kind in ("gptq", "awq"):
        with pytest.raises(CheckpointError, match=r"one kind|are none of those"):
            write(kind, tmp_path / kind, forms)


def test_mixed_bits_for_auto_round(tmp_path: Path) -> None:
    """The commonest kind for all, others by the names of their layers, and plain ones as floats."""
    forms = {WEIGHT: "int4-g32", DOWN: "int8", WEIGHT.replace("0", "1"): "int4-g32", DOWN.replace("0", "1"): "int2-g64"}
    expected = write("auto-round", tmp_path / "m", forms)
    source = open_source(tmp_path / "m")
    assert all(torch.equal(source.read(name), w) for name, w in expected.items())
    said = settings(tmp_path / "m")
    assert (said["bits"], said["group_size"]) == (4, 32)
    assert said["extra_config"][DOWN.removesuffix(".weight")] == {
        "bits": 8, "group_size": -1, "sym": True, "data_type": "int",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="zero points"):
        write("auto-round", tmp_path / "z", {WEIGHT: "int4-asym-g32"})


@pytest.mark.parametrize("seed", range(8))
def test_nvfp4_up_to_the_last_bit_of_its_global_scale(tmp_path: Path, seed: int) -> None:
    """It divides where we multiply: the same numbers where a divisor gives them, else told. Five roundings lie
    between the two, to float32."""
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)) * 3.0**seed
    q = quantize_tensor(w, "nvfp4")
    (tmp_path / "m").mkdir()
    target = open_target("compressed-tensors", tmp_path / "m", 1 << 20)
    entries = {WEIGHT: Entry(q.format, q.shape)}
    target.layout(entries)
    target.pack(WEIGHT, q.fields)
    target.finish(CONFIG, describe(entries, {}))
    found, expected = open_source(tmp_path / "m").read(WEIGHT), q.dequantize()
    assert target.rounded.keys() <= {WEIGHT}
    assert torch.equal(found, expected) == (not target.rounded)
    assert "last bit" in target.but_for
    assert all(0 < loss <= (3 * 2.0**-24) ** 2 for loss in target.rounded.values())
    torch.testing.assert_close(found, expected, rtol=5 * 2.0**-24, atol=0)


def test_integer_activations(tmp_path: Path) -> None:
    """W8A8: codes of 8 bits under their plain name, tokens rounded as they come."""
    expected = write("compressed-tensors", tmp_path / "m", {WEIGHT: "int8"}, "int8")
    assert read_header(tmp_path / "m" / "model.safetensors")[WEIGHT].dtype == torch.int8
    group = settings(tmp_path / "m")["config_groups"]["group_0"]
    assert (group["format"], group["input_activations"]["strategy"]) == ("int-quantized", "token")
    assert torch.equal(open_source(tmp_path / "m").read(WEIGHT), expected[WEIGHT])


def test_static_activations(tmp_path: Path) -> None:
    """The scale of the tensor beside the weight, and no token rounded by itself."""
    q = quantize_tensor(torch.randn(64, 128), "int8")
    (tmp_path / "m").mkdir()
    target = open_target("compressed-tensors", tmp_path / "m", 1 << 20)
    entries = {WEIGHT: Entry(q.format, q.shape, "int8-static")}
    target.layout(entries)
    target.pack(WEIGHT, {**q.fields, ACT_SCALE: torch.tensor([0.25])})
    target.finish(CONFIG, describe(entries, {}))
    group = settings(tmp_path / "m")["config_groups"]["group_0"]["input_activations"]
    assert (group["strategy"], group["dynamic"]) == ("tensor", False)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.get_tensor(f"{UP}.input_scale").tolist() == [0.25]
    assert torch.equal(open_source(tmp_path / "m").read(WEIGHT), q.dequantize())


def test_versions_of_gptq(tmp_path: Path) -> None:
    """v1 of symmetric integers; zero points may be 0, which v1 stores as -1: v2."""
    for form, version in (("int4-g32", "gptq"), ("int4-asym-g32", "gptq_v2")):
        write("gptq", tmp_path / form, {WEIGHT: form})
        assert settings(tmp_path / form)["checkpoint_format"] == version
        assert json.loads((tmp_path / form / "quantize_config.json").read_text()) == settings(tmp_path / form)


INT4 = quantize_tensor(torch.randn(64, 128), "int4-g32")
REFUSED: dict[str, tuple[str, Entry]] = {
    "no integers": (WEIGHT, Entry(quantize_tensor(torch.randn(64, 128), "nf4").format, (64, 128))),
    "a trellis": (WEIGHT, Entry(quantize_tensor(torch.randn(64, 256), "trellis-2").format, (64, 256))),
    "zero points in floats": (
        WEIGHT,
        Entry(quantize_tensor(torch.randn(64, 128), "int4-affine-g64").format, (64, 128)),
    ),
    "a rotation": (WEIGHT, Entry(INT4.format, (64, 128), "float", False, Hadamard(128, 0))),
    "an embedding": ("model.embed_tokens.weight", Entry(INT4.format, (64, 128))),
    "experts": (WEIGHT, Entry(INT4.format, (4, 64, 128))),
    "inputs first": (WEIGHT, Entry(INT4.format, (64, 128), "float", True)),
    "groups that do not divide": (WEIGHT, Entry(INT4.format, (64, 80))),
    "static activations of 4 bits": (WEIGHT, Entry(INT4.format, (64, 128), "int8-static")),
    "5 bits": (WEIGHT, Entry(quantize_tensor(torch.randn(64, 128), "int5-g64").format, (64, 128))),
}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_any_work(kind: str, what: str, tmp_path: Path) -> None:
    """With the tensor and what to do instead; nothing is written."""
    name, entry = REFUSED[what]
    with pytest.raises(CheckpointError) as error:
        open_target(kind, tmp_path, 1 << 20).layout({name: entry})
    assert error.value.where == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ENGINES)
def test_nothing_packed(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing in it is packed"):
        open_target(kind, tmp_path, 1 << 20).layout({"a.weight": TensorInfo(torch.float32, (4, 4))})
