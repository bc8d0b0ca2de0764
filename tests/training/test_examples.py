"""The examples of training, on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import bitfold
import forks
import tiny_lm
from bitfold.nn import QLinear

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    done = forks.run(EXAMPLES / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kl(line: str) -> float:
    return float(line.partition("held-out KL ")[2].split()[0].strip(","))


def test_qat_ends_at_a_packed_folder(tmp_path: Path) -> None:
    source = tiny_lm.folder(tmp_path / "source", tiny_lm.model())
    options = ("--format", "int2-g32", "--blocks", 1, "--minutes", 0.08, "--tokens", 64, "--rate", 3e-3)
    rounded, trained, packed = map(kl, run("qat.py", source, "-o", tmp_path / "out", *options).splitlines())
    assert trained < 0.9 * rounded
    assert abs(packed - trained) < 0.02 * trained
    loaded: Any = bitfold.load(tmp_path / "out")
    assert len(loaded.model.layers) == 1
    assert isinstance(loaded.model.layers[0].mlp.up_proj, QLinear)


def test_a_student_of_a_quantized_teacher(tmp_path: Path) -> None:
    config: Any = tiny_lm.model().config
    config.num_hidden_layers, config.layer_types = 4, None
    torch.manual_seed(0)
    source = tiny_lm.folder(tmp_path / "source", transformers.LlamaForCausalLM(config))
    bitfold.quantize(source, tmp_path / "teacher", format="int4-g32")
    options = ("--keep", 2, "--minutes", 0.08, "--tokens", 64, "--rate", 3e-3)
    lines = run("distillation.py", tmp_path / "teacher", "-o", tmp_path / "out", *options).splitlines()
    before, after = (kl(line) for line in lines if "held-out" in line)
    assert after < 0.9 * before
    assert (tmp_path / "out" / "model.safetensors").is_file()
