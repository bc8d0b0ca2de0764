"""Checkpoints that other programs quantized: told apart from plain ones, and refused by every command, by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import bitfold
from bitfold.checkpoints import convert, open_source
from bitfold.checkpoints.foreign import foreign_quantization
from bitfold.checkpoints.headers import DTYPES, ForeignInfo, read_header
from bitfold.checkpoints.inspection import inspect
from bitfold.cli import app
from bitfold.errors import CheckpointError
from bitfold.models.model_ref import ModelRef
from bitfold.system.tensorinfo import TensorInfo
from model_zoo import ZOO

Infos = dict[str, TensorInfo]
UP = "model.layers.0.mlp.up_proj"
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
U8, I8, I32, U32 = torch.uint8, torch.int8, torch.int32, torch.uint32
FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def infos(prefix: str, **tensors: tuple[torch.dtype, tuple[int, ...]]) -> Infos:
    """Tensors of one layer; two underscores in a keyword stand for a dot."""
    return {prefix + name.replace("__", "."): TensorInfo(*info) for name, info in tensors.items()}


# What the tensors of one layer look like when the config says nothing of it, and a word of the answer.
STRIPPED: dict[str, tuple[Infos, str]] = {
    "fp8": (infos(f"{UP}.", weight=(FP8, (64, 64)), weight_scale_inv=(F32, (1, 1))), "FP8"),
    "fp8 cast to bf16, scales kept": (infos(f"{UP}.", weight=(BF16, (64, 64)), weight_scale_inv=(F32, (1, 1))), "FP8"),
    "fp8 without scales": (infos(f"{UP}.", weight=(FP8, (64, 64))), "FP8"),
    "fp8 e5m2": (infos(f"{UP}.", weight=(torch.float8_e5m2, (64, 64)), weight_scale=(F32, (1,))), "scales"),
    "fp8 with scales of 8 bits": (infos(f"{UP}.", weight=(FP8, (64, 64)), scale=(E8M0, (1, 1))), "FP8"),
    "fp8 experts": (infos("experts.", gate_up_proj=(BF16, (4, 8, 8)), gate_up_proj_scale_inv=(F32, (4, 1, 1))), "FP8"),
    "gptq": (infos(f"{UP}.", qweight=(I32, (8, 64)), qzeros=(I32, (2, 8)), scales=(F16, (2, 64))), "GPTQ"),
    "gptq without zeros": (infos(f"{UP}.", qweight=(I32, (8, 64)), scales=(F16, (2, 64))), "GPTQ"),
    "mxfp4": (infos("experts.", down_proj_blocks=(U8, (4, 8, 2, 16)), down_proj_scales=(U8, (4, 8, 2))), "MXFP4"),
    "nf4": (infos(f"{UP}.", weight=(U8, (2048, 1)), weight__absmax=(U8, (64,))), "bitsandbytes"),
    "int8 of bitsandbytes": (infos(f"{UP}.", weight=(I8, (64, 64)), SCB=(F32, (64,))), "bitsandbytes"),
    "compressed-tensors": (infos(f"{UP}.", weight_packed=(I32, (64, 8)), weight_scale=(BF16, (64, 2))), "compressed"),
    "w8a8": (infos(f"{UP}.", weight=(I8, (64, 64)), weight_scale=(BF16, (64, 1))), "integers"),
    "nvfp4": (infos(f"{UP}.", weight=(U8, (64, 32)), weight_scale=(FP8, (64, 4)), weight_scale_2=(F32, ())), "NVFP4"),
    "hqq": (infos(f"{UP}.", W_q=(U8, (32, 64)), scale=(F16, (64, 1)), zero=(F16, (64, 1))), "HQQ"),
    "marlin": (infos(f"{UP}.", B=(I32, (4, 128)), s=(F16, (1, 64))), "Marlin"),
    "mlx": (infos(f"{UP}.", weight=(U32, (64, 8)), scales=(F16, (64, 1)), biases=(F16, (64, 1))), "MLX"),
    "quanto": (infos(f"{UP}.", weight___data=(I8, (64, 64)), weight___scale=(F32, (64, 1))), "quanto"),
    "torchao": (
        {f"{UP}.weight:qdata": TensorInfo(I8, (64, 64)), f"{UP}.weight:scale": TensorInfo(F32, (64,))},
        "torchao",
    ),
    "aqlm": (infos(f"{UP}.", codes=(torch.int16, (8, 8, 1)), codebooks=(F16, (1, 99, 1, 8))), "AQLM"),
    "exl3": (infos(f"{UP}.", trellis=(torch.int16, (4, 4, 64)), suh=(F16, (64,)), svh=(F16, (64,))), "EXL3"),
    "bitfold": (infos(f"{UP}.weight.", codes=(U8, (64, 32)), scale=(F16, (64, 1))), "bitfold"),
    "bitnet": (infos(f"{UP}.", weight=(U8, (16, 64)), weight_scale=(BF16, (1,))), "integers"),
    "4-bit floats": ({f"{UP}.weight": ForeignInfo(U8, (64, 64), "F4", 2048)}, "F4"),
    "a type of the future": ({f"{UP}.weight": ForeignInfo(U8, (64, 64), "F3_E1M1", 1536)}, "F3_E1M1"),
}

DECLARED: dict[str, dict[str, Any]] = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "no method": {"quantization_config": {"load_in_8bit": True}},
    "within a part": {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    "older compressed-tensors": {"compression_config": {"format": "pack-quantized"}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}},
}

PLAIN: dict[str, Infos] = {
    "clip": {"logit_scale": TensorInfo(F32, ()), "visual.proj.weight": TensorInfo(F32, (8, 8))},
    "a norm": infos("norm.", scale=(F32, (8,)), weight=(F32, (8,))),
    "a router": infos("router.", per_expert_scale=(BF16, (8,)), scale=(BF16, (8,)), weight=(BF16, (8, 8))),
    "scales of a layer": infos("attn.", scales=(F32, (8,)), weight=(F32, (8, 8)), biases=(F32, (8,))),
    "an older gpt2": infos("h.0.attn.", bias=(U8, (1, 1, 8, 8)), masked_bias=(F32, ()), scale=(F32, ())),
    "swin": infos("attn.", relative_position_index=(torch.int64, (49, 49)), logit_scale=(F32, (3, 1, 1))),
    "batch norm": infos("bn.", num_batches_tracked=(torch.int64, ()), weight=(F32, (8,)), running_mean=(F32, (8,))),
    "weights of a query": infos("attn.", q_weight=(BF16, (8, 8)), qweight=(BF16, (8, 8)), scale=(BF16, (1,))),
    "vector quantization": infos("quantizer.", codebook=(F32, (16, 8)), indices=(torch.int64, (4, 4))),
    "positions": infos("embeddings.", position_ids=(torch.int64, (1, 64)), token_type_ids=(torch.int64, (1, 64))),
    "weight norm": infos("conv.", weight_g=(F32, (8, 1, 1)), weight_v=(F32, (8, 8, 3))),
}
PLAIN_CONFIGS: list[dict[str, Any]] = [
    {},
    {"quantization_config": None},
    {"quantization_config": {}},
    {"quantization": "no"},
]


@pytest.mark.parametrize("kind", STRIPPED)
def test_tensors_tell(kind: str) -> None:
    """With nothing in the config, the tensors are enough, and one of them is named."""
    tensors, word = STRIPPED[kind]
    found = foreign_quantization({}, {"embed.weight": TensorInfo(BF16, (9, 8)), **tensors})
    assert found is not None
    assert word in found
    assert UP in found or "experts." in found


@pytest.mark.parametrize("kind", DECLARED)
def test_a_config_is_believed(kind: str) -> None:
    assert foreign_quantization(DECLARED[kind], PLAIN["clip"]) is not None


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
def test_plain_models_are_plain(kind: str, config: dict[str, Any]) -> None:
    assert foreign_quantization(config, PLAIN[kind]) is None


@pytest.mark.parametrize("family", ZOO)
def test_families_are_plain(family: str) -> None:
    """Every parameter and buffer of every model family of the tests."""
    state = ZOO[family].build().state_dict()
    tensors = {name: TensorInfo(w.dtype, tuple(w.shape)) for name, w in state.items()}
    assert foreign_quantization({}, tensors) is None


def folder(path: Path, config: dict[str, Any], tensors: Infos) -> Path:
    """A folder with these tensors, all zeros."""
    path.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
    (path / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, info in tensors.items():
        label = info.label if isinstance(info, ForeignInfo) else names[info.dtype]
        header[name] = {"dtype": label, "shape": info.shape, "data_offsets": [at, at := at + info.nbytes]}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return path


CLI = {
    "quantize": ["quantize", "MODEL", "--bits", "8", "-o", "OUT"],
    "quantize --dry-run": ["quantize", "MODEL", "--bits", "8", "--dry-run"],
    "convert": ["convert", "MODEL", "-o", "OUT"],
    "eval": ["eval", "MODEL"],
    "eval --reference": ["eval", "PLAIN", "--reference", "MODEL"],
    "eval --metric embedding": ["eval", "MODEL", "--metric", "embedding", "--reference", "PLAIN"],
    "layers": ["layers", "MODEL", "--reference", "PLAIN"],
    "compare": ["compare", "MODEL"],
    "report": ["report", "MODEL", "-o", "OUT"],
    "generate": ["generate", "MODEL", "a"],
    "chat": ["chat", "MODEL"],
    "inspect --activations": ["inspect", "MODEL", "--activations", "default"],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("plain") / "m"
    return folder(path, {}, {f"{UP}.weight": TensorInfo(BF16, (8, 8))})


@pytest.mark.parametrize("command", CLI)
@pytest.mark.parametrize("how", ["declared", "stripped"])
def test_every_command_refuses(command: str, how: str, plain: Path, tmp_path: Path) -> None:
    """Exit code 3, the name of the method, nothing written."""
    config = {"quantization_config": {"quant_method": "fbgemm_fp8"}} if how == "declared" else {}
    model = folder(tmp_path / "m", config, STRIPPED["fp8"][0])
    words = {"MODEL": str(model), "PLAIN": str(plain), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, [words.get(word, word) for word in CLI[command]])
    assert done.exit_code == 3, done.output
    assert "quantized already" in done.output
    assert "fp8" in done.output.lower()
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("kind", STRIPPED)
def test_looked_at_and_not_opened(kind: str, tmp_path: Path) -> None:
    """`inspect` says what it is, the rest of the library refuses it."""
    path = folder(tmp_path / "m", {}, STRIPPED[kind][0])
    assert STRIPPED[kind][1] in inspect(path).kind
    uses: list[Callable[[Path], object]] = [open_source, ModelRef.of]
    uses += [lambda p: convert(p, tmp_path / "o"), lambda p: bitfold.quantize(p, tmp_path / "o", bits=4)]
    for use in uses:
        with pytest.raises(CheckpointError, match="quantized already"):
            use(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_own_file_of_modelopt(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {}, PLAIN["clip"])
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(CheckpointError, match=r"NVFP4 \(ModelOpt\)"):
        open_source(path)


RARE = [("F4", 32), ("F6_E2M3", 48), ("F6_E3M2", 48), ("F8_E8M0", 64), ("F8_E5M2FNUZ", 64), ("X17", 5)]


@pytest.mark.parametrize(("dtype", "bytes_of_64"), RARE)
def test_rare_dtypes_are_not_damage(dtype: str, bytes_of_64: int, tmp_path: Path) -> None:
    """They are listed with the sizes of the file; a size that does not fit is damage still."""
    for size, sound in ((bytes_of_64, True), (bytes_of_64 + 1, dtype == "X17")):
        text = json.dumps({"w": {"dtype": dtype, "shape": [8, 8], "data_offsets": [0, size]}}).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
        if sound:
            assert (read_header(file)["w"].shape, read_header(file)["w"].nbytes) == ((8, 8), size)
        else:
            with pytest.raises(CheckpointError, match="do not follow its shape"):
                read_header(file)


def test_dtypes_of_the_library(tmp_path: Path) -> None:
    """What safetensors writes, its header is read for."""
    half = [d for d in dir(torch) if d.startswith("float8") or d.startswith("float4")]
    for name in half:
        dtype = getattr(torch, name)
        save_file({"w": torch.zeros(4, 8, dtype=torch.uint8).view(dtype)}, tmp_path / "m.safetensors")
        assert read_header(tmp_path / "m.safetensors")["w"].nbytes == 32, name
