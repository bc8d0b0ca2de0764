"""How a model is walked is found by running it, whatever its family; and `--bits 4` ends well on all of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.calibration.shape import walk_shape
from bitfold.errors import ModelError
from model_zoo import HYBRIDS, ZOO

TEXT: dict[str, Any] = {"nsamples": 2, "seqlen": 32}
# family -> lists of blocks that are walked, and whether some layers are heard only while the whole model runs
SHAPES: dict[str, tuple[list[str], bool]] = {
    "llama": (["model.layers"], False),
    "gpt2": (["transformer.h"], False),
    "jamba": (["model.layers"], False),  # two classes of blocks in one list
    "rwkv": ([], True),  # halves its activations between blocks
    "gemma3n": ([], True),  # later layers use the keys and values of earlier ones
    "glm5": (["model.layers"], False),  # blocks return the chosen positions as well
    "t5": ([], True),  # the first block makes the position bias of all
    "bart": (["model.encoder.layers", "model.decoder.layers"], False),
    "xlnet": (["transformer.layer"], False),
    "albert": ([], True),  # one block, run several times
    "llava": (["model.language_model.layers"], False),  # the vision tower does not run on text
}


@pytest.mark.parametrize("family", SHAPES)
def test_lists_of_blocks(family: str) -> None:
    """Which are chains, and what of a model is outside them."""
    shape = walk_shape(HYBRIDS[family]() if family in HYBRIDS else ZOO[family].build())
    chains, others = SHAPES[family]
    assert shape.obstacle is None
    assert [chain.path for chain in shape.chains] == chains
    inside = [path for path, _ in shape.others if any(part.isdigit() for part in path.split("."))]
    assert bool(inside) == others
    assert bool(shape.unwalkable) >= others


class Sideways(nn.Module):
    """Blocks of which one reads what another has left on a shared object."""

    main_input_name = "input_ids"

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.config = tiny_lm.model().config
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(3))
        self.leaks, self.left = leaks, torch.zeros(0)
        for number, block in enumerate(self.blocks):
            block.register_forward_hook(lambda _m, _i, out, n=number: self.leave(n, out))

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed

    def leave(self, number: int, out: torch.Tensor) -> torch.Tensor:
        """Blocks after the first add what it left."""
        if number == 0:
            self.left = out * 2
        return out + self.left if self.leaks and number else out

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids in, activations out."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("leaks", [False, True])
def test_what_passes_beside_the_output_is_seen(leaks: bool) -> None:
    """No argument shows it, but the work of the later blocks uses it."""
    shape = walk_shape(Sideways(leaks))
    assert [chain.path for chain in shape.chains] == ([] if leaks else ["blocks"])


def test_layers_of_one_input_are_one_group() -> None:
    """In the order of their execution."""
    (chain,) = walk_shape(tiny_lm.model()).chains
    names = [[layer.rpartition(".")[2] for layer in group] for group in chain.blocks[1].groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("family", HYBRIDS)
def test_bits_alone_end_well(family: str, tmp_path: Path) -> None:
    """A folder that loads; calibrated wherever the text gets to."""
    made = HYBRIDS[family]()
    tiny_lm.folder(tmp_path / "source", made)
    (tmp_path / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    text = Calibration(str(tmp_path / "text.txt"), **TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = bitfold.quantize(tmp_path / "source", tmp_path / "out", bits=4, calibration=text)
        loaded: Any = bitfold.load(tmp_path / "out")
    assert report.quantized
    failed = {fallback["where"] for fallback in report.fallbacks}
    assert failed <= {"token weights"}, report.fallbacks
    if walk_shape(made).obstacle is None:
        assert any(t.output_error is not None for t in report.quantized)
    else:
        assert "without calibration" in report.method
        return
    ids = torch.arange(1, 9)[None]
    inputs = {"decoder_input_ids": ids} if loaded.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=ids, **inputs)[0]).all()


def test_a_named_method_is_refused_before_the_work(tmp_path: Path) -> None:
    """Where the model does not run on text, with the reason; nothing is left behind."""
    tiny_lm.folder(tmp_path / "source", HYBRIDS["whisper"]())
    with pytest.raises(ModelError, match="does not run on text"):
        bitfold.quantize(tmp_path / "source", tmp_path / "out", bits=4, method="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
