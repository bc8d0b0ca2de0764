"""Distillation of a small model: gradients, memory, what is written, going on after a kill."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitfold
import forks
import tiny_lm
from bitfold.checkpoints.manifest import verify
from bitfold.errors import ResourceError, UsageError
from bitfold.evaluation.predictions import TopRows
from bitfold.formats import FORMATS, rows_rescale
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.load import load_folder
from bitfold.nn import QLinear
from bitfold.system import progress
from bitfold.training import distill as module
from bitfold.training import student as students
from bitfold.training.distill import distill
from bitfold.training.layers import FrozenWeight, TrainedLinear
from bitfold.training.losses import divergence_and_gradient
from bitfold.training.masters import share_of
from bitfold.training.options import Distillation

SHORT: dict[str, Any] = {"seqlen": 48, "batch": 2, "likeliest": 64, "windows": 40}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its tokenizer and a text."""
    folder = tiny_lm.folder(tmp_path_factory.mktemp("distilled") / "source", tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    """In two bits, rounded."""
    out = source.with_name("quantized")
    bitfold.quantize(source, out, format="trellis-2", transform="hadamard")
    return out


def how(source: Path, **more: Any) -> Distillation:
    return Distillation(str(source / "text.txt"), **{**SHORT, "steps": 12, **more})


def loss(folder: Path, source: Path) -> float:
    found = bitfold.evaluate(str(folder), str(source), tiny_lm.TEXT[:3000], context=64, max_tokens=1024)
    assert found.kl_mean is not None
    return found.kl_mean


def test_the_gradient_is_that_of_the_divergence() -> None:
    """Against autograd through the same divergence in float64, words the teacher does not name being one."""
    generator = torch.Generator().manual_seed(0)
    teacher, logits = (3 * torch.randn(5, 40, generator=generator) for _ in range(2))
    rows = TopRows.of(teacher, 7)
    wide = logits.double().requires_grad_()
    q, p = wide.softmax(1), rows.log_probabilities.double().exp()
    chosen, rest = q.gather(1, rows.words.long()), 1 - p.sum(1)
    kl = (p * (p.log() - chosen.log())).sum(1) + rest * (rest.log() - (1 - chosen.sum(1)).log())
    kl.sum().backward()
    assert wide.grad is not None
    found, gradient = divergence_and_gradient(logits.clone(), rows)
    assert torch.allclose(found.double(), kl, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradient.double(), wide.grad, rtol=1e-3, atol=1e-6)


def test_all_words_make_the_whole_divergence() -> None:
    """With as many words kept as there are, it is the KL divergence and its gradient is q - p."""
    generator = torch.Generator().manual_seed(1)
    teacher, logits = (torch.randn(3, 20, generator=generator) for _ in range(2))
    kl, gradient = divergence_and_gradient(logits.clone(), TopRows.of(teacher, 50))
    p, q = teacher.softmax(1), logits.softmax(1)
    assert torch.allclose(kl, (p * (p / q).log()).sum(1), atol=1e-3)
    assert torch.allclose(gradient, q - p, atol=1e-3)


@pytest.mark.parametrize("keep", [True, False])
def test_factors_of_rows_have_the_gradients_of_the_product(keep: bool) -> None:
    """Against autograd through factor * (x W^T) + b."""
    generator = torch.Generator().manual_seed(2)
    w, x, b = (torch.randn(*shape, generator=generator) for shape in ((32, 16), (2, 5, 16), (32,)))
    layer = QLinear(quantize_tensor(w, "int4"), b)
    made = TrainedLinear(layer, FrozenWeight(layer.weight, torch.float32, keep=keep), trained=True)
    assert made.factor is not None
    with torch.no_grad():
        made.factor.copy_(1 + 0.1 * torch.randn(32, 1, generator=generator))
    factor = made.factor.detach().clone().requires_grad_()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    weight = layer.weight.dequantize(torch.float32)
    answers = [made(inputs[0]), nn.functional.linear(inputs[1], factor * weight, b)]
    assert torch.allclose(answers[0], answers[1], atol=1e-4)
    for answer in answers:
        answer.square().sum().backward()
    assert made.factor.grad is not None
    assert factor.grad is not None
    assert torch.allclose(made.factor.grad, factor.grad, rtol=1e-3, atol=1e-2)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)


def test_less_is_lost_and_the_format_is_the_same(source: Path, quantized: Path, tmp_path: Path) -> None:
    """Codes are those of before, scales and norms are not; it loads, is whole, and says what was done."""
    found = distill(quantized, source, tmp_path / "out", how(source, steps=60))
    assert found.kl_after < 0.95 * found.kl_before
    assert loss(tmp_path / "out", source) < 0.97 * loss(quantized, source)
    assert verify(tmp_path / "out").problems == []
    before, after = (load_folder(folder).state_dict() for folder in (quantized, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"scale", "weight"}
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before if "norm" in name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["distilled"]["steps"] == found.steps
    assert "distilled from source" in (tmp_path / "out" / "README.md").read_text()
    assert bitfold.load(tmp_path / "out").generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)


def kinds() -> list[str]:
    """A format of each kind whose rows can be rescaled and whose groups fit into rows of 64."""
    found: dict[Any, str] = {}
    for name, format in FORMATS.items():
        text = format.describe()
        scale = text.get("scale")
        wide = isinstance(scale, dict) and scale["block"][1] > 64
        if rows_rescale(format) and not wide and format.books is None:
            found.setdefault((text["family"], scale["offset"] if isinstance(scale, dict) else None), name)
    return list(found.values())


@pytest.mark.parametrize("name", kinds())
def test_every_format_with_row_scales(source: Path, tmp_path: Path, name: str) -> None:
    """A folder of each comes out in the same format, and held-out text never loses by it."""
    bitfold.quantize(source, tmp_path / "q", format=name)
    found = distill(tmp_path / "q", source, tmp_path / "out", how(source, steps=2))
    assert found.kl_after <= found.kl_before
    assert found.scales > 0
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("q", "out"))
    assert before["quantization_config"]["tensors"] == after["quantization_config"]["tensors"]


def test_blocks_run_twice_and_weights_decoded_again_learn_the_same(source: Path, quantized: Path) -> None:
    """Gradients of the three ways to fit into memory agree; which one is taken follows from the ceiling."""
    ids = torch.arange(40)
    teacher = TopRows.of(torch.randn(39, 257, generator=torch.Generator().manual_seed(0)), 16)
    blocks = ["model.layers.0", "model.layers.1"]
    found = []
    for way in ((True, False), (True, True), (False, True)):
        student = students.Student(load_folder(quantized, dtype=torch.float32), blocks, students.Fit(*way, 0))
        groups = student.groups(1.0, 1.0, 1.0)
        for p in [p for group in groups for p in group.parameters.values()]:
            p.requires_grad_(True)
        student.learn(ids, teacher, 1.0)
        found.append({name: p.grad for group in groups for name, p in group.parameters.items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert gradient is not None
            assert torch.allclose(gradient, other[name], rtol=1e-3, atol=1e-5), name
    model = load_folder(quantized, dtype=torch.float32)
    free, kept = students.fitting(model, blocks, 40, None), 0
    assert (free.keep, free.recompute) == (True, False)
    for limit in range(free.nbytes - 1, 0, -10_000):
        try:
            way = students.fitting(model, blocks, 40, limit)
        except ResourceError:
            break
        assert way.nbytes <= limit
        kept += 1
    assert kept


def test_a_ceiling_is_refused_in_words(source: Path, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="are allowed"):
        distill(quantized, source, tmp_path / "out", how(source), max_memory=1 << 20)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_vocabulary(source: Path, quantized: Path, tmp_path: Path) -> None:
    other = tiny_lm.model()
    other.resize_token_embeddings(300)
    tiny_lm.folder(tmp_path / "other", other)
    with pytest.raises(UsageError, match="predicts 300 tokens"):
        distill(quantized, tmp_path / "other", tmp_path / "out", how(source))


def test_too_little_text(source: Path, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a" * 60)
    with pytest.raises(UsageError, match="windows"):
        distill(quantized, source, tmp_path / "out", Distillation(str(tmp_path / "short.txt"), **SHORT))


def test_minutes_become_steps(source: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TEACHER", 0.5)
    found = distill(quantized, source, tmp_path / "out", how(source, steps=None, minutes=0.1))
    assert found.planned > 5
    assert found.steps <= found.planned
    assert found.seconds < 60


def test_rates_rise_and_fall() -> None:
    shares = [share_of(step, 30, 5) for step in range(30)]
    assert shares[:5] == [share_of(step, 6, 5) for step in range(5)]
    assert shares[4] == shares[5] == 1
    assert all(a > b for a, b in pairwise(shares[5:]))
    assert 0 < shares[-1] < 0.01


_RUN = """
import sys
from bitfold.training.distill import distill
from bitfold.training.options import Distillation
how = Distillation(sys.argv[4], steps=30, seqlen=48, batch=2, likeliest=64, windows=40)
print(distill(sys.argv[1], sys.argv[2], sys.argv[3], how).kl_after)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_it_goes_on_to_the_same_bytes(source: Path, quantized: Path, tmp_path: Path) -> None:
    """Killed while the teacher reads, and while the student learns."""
    command, text = ("-c", _RUN, quantized, source), source / "text.txt"
    assert forks.run(*command, tmp_path / "whole", text).returncode == 0
    out = tmp_path / "killed"
    journal = tmp_path / ".killed.partial" / "journal.jsonl"
    for sign in (b'"kind":"teacher","window":3,', b'"step":5,', b'"step":14,'):
        process = forks.Interpreter(*command, out, text)
        while process.poll() is None and not (journal.is_file() and sign in journal.read_bytes()):
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert journal.is_file()
    assert forks.run(*command, out, text).returncode == 0
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_of_a_number_of_steps_the_teacher_reads_what_they_take(source: Path, quantized: Path, tmp_path: Path) -> None:
    """And says so: its time is that of these windows, not of the whole text."""
    totals: list[int] = []
    real = progress.bar

    def noted(what: str, total: int) -> Any:
        if what == "teacher":
            totals.append(total)
        return real(what, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "bar", noted)
        found = distill(quantized, source, tmp_path / "out", how(source, steps=2))
    assert totals == [found.held_out + 2 * SHORT["batch"]] == [found.windows + found.held_out]
