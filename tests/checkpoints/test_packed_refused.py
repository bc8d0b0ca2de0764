"""Packed weights that are damaged, hostile, or written in a way that no reader covers: one CheckpointError each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfold.checkpoints import open_source
from bitfold.checkpoints.inspection import inspect
from bitfold.errors import CheckpointError
from packed_files import NAMES, UP, golden, gptq_layer, write_folder

Tensors = dict[str, Tensor]
Config = dict[str, Any]
GPTQ: Config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def gptq(**said: Any) -> tuple[Tensors, Config]:
    """A layer of GPTQ of 4 bits, and its config with changes."""
    parts, _ = gptq_layer(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), 4, 32)
    return {f"{UP}.{part}": w for part, w in parts.items()}, {"quantization_config": {**GPTQ, **said}}


def read_all(folder: Path) -> None:
    """Open it and read every tensor."""
    source = open_source(folder)
    for name in source.names():
        source.read(name)


def refused(path: Path, tensors: Tensors, config: Config, match: str) -> None:
    """Opening it, or reading every tensor of it, says so."""
    folder = write_folder(path / "m", tensors, config)
    with pytest.raises(CheckpointError, match=match):
        read_all(folder)
    assert inspect(folder).tensors  # looked at all the same


NOT_COVERED: dict[str, tuple[Config, str]] = {
    "marlin": ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "planar": ({"checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p'"),
    "an older marlin": ({"is_marlin_format": True}, "Marlin"),
    "packed in 64 bits": ({"pack_dtype": "int64"}, "int64"),
    "an adapter": ({"adapter": {"name": "lora"}}, "adapter"),
    "another program": ({"quant_method": "quark"}, "quark"),
    "awq of 8 bits": ({"quant_method": "awq", "bits": 8}, "8 bits"),
    "awq gemv": ({"quant_method": "awq", "version": "gemv"}, "gemv"),
    "other auto-round": (
        {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
        "packing_format",
    ),
    "compressed, sparse": ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}, "sparsity"),
    "compressed, rotated": ({"quant_method": "compressed-tensors", "transform_config": {"R1": {}}}, "transform"),
    "compressed, no groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups"),
    "no number of bits": ({"bits": "four"}, "bits"),
    "other bits than the tensors": ({"bits": 8}, "is of 4 bits"),
    "zero bits": ({"bits": 0}, "is of 4 bits"),
    "groups that do not fit": ({"group_size": 24}, "groups of 24"),
}


@pytest.mark.parametrize("kind", NOT_COVERED)
def test_what_is_not_covered_is_named(kind: str, tmp_path: Path) -> None:
    said, match = NOT_COVERED[kind]
    tensors, config = gptq(**said)
    refused(tmp_path, tensors, config, match)


def test_layers_that_are_turned_around(tmp_path: Path) -> None:
    """GPT-2's layers hold (inputs, outputs): programs turn them, and nothing in the file says so."""
    tensors, config = gptq()
    refused(tmp_path, tensors, {**config, "model_type": "gpt2"}, "gpt2")


def test_mlx_of_families_that_it_changes(tmp_path: Path) -> None:
    tensors, _, config = golden("mlx-4")
    refused(tmp_path, tensors, {**config, "model_type": "qwen3_next"}, "qwen3_next")


DAMAGE: dict[str, Callable[[Tensors], None]] = {
    "a group that does not exist": lambda t: t[f"{UP}.g_idx"].__setitem__(3, 2),
    "a negative group": lambda t: t[f"{UP}.g_idx"].__setitem__(0, -1),
    "no scales": lambda t: t.__delitem__(f"{UP}.scales"),
    "no zero points": lambda t: t.__delitem__(f"{UP}.qzeros"),
    "scales of integers": lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()}),
    "a scale too few": lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1]}),
    "words cut short": lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:5]}),
    "no words": lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:0]}),
    "one dimension": lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].flatten()}),
    "zero points of no bits": lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:, :0]}),
    "zero points of odd bits": lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:, :3]}),
    "another weight that is packed": lambda t: t.update({"x.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_checkpoint_error(kind: str, tmp_path: Path) -> None:
    tensors, config = gptq()
    DAMAGE[kind](tensors)
    refused(tmp_path, tensors, config, ".")


# What hqq only tells, what bitsandbytes writes of plain rows, and the zero points without which integers are symmetric.
NOT_NEEDED = (
    ".nbits", ".unpack_view_dtype", ".view_as_float", ".quant_scale", ".quant_zero", ".compute_dtype", ".offload_meta",
    ".encoded_state_dict", ".stores_quant_config", ".channel_wise", ".optimize", ".round_zero", ".group_size",
    ".weight_format", "weight_zero_point",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "other dtype", "scalar"])
def test_every_part_of_every_program(name: str, how: str, tmp_path: Path) -> None:
    """One of the parts gone, cut, emptied, of another dtype or a single number: an error, or a part nobody needs."""
    whole, _, config = golden(name)
    for i, part in enumerate(whole):
        tensors = dict(whole)
        if how == "missing":
            del tensors[part]
        elif how == "scalar":
            tensors[part] = whole[part].flatten()[0].clone()
        elif how == "other dtype":
            tensors[part] = torch.zeros(whole[part].shape, dtype=torch.float64)
        else:
            tensors[part] = whole[part].flatten()[: 0 if how == "empty" else -1].clone()
        folder = write_folder(tmp_path / str(i), {"embed": torch.zeros(2), **tensors}, config)
        try:
            read_all(folder)
        except CheckpointError:
            continue
        needless = part.endswith(NOT_NEEDED) or (part.endswith("g_idx") and how == "missing" and name != "gptq-4-order")
        assert needless or (how == "scalar" and whole[part].numel() == 1), part
