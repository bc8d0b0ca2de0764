"""Finetuning of a small model: adapters that PEFT loads, starts, memory, going on after a kill, what is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
import forks
import tiny_lm
from bitfold.errors import ResourceError, UsageError
from bitfold.models.load import load_folder
from bitfold.models.model_ref import ModelRef
from bitfold.run.finetuning import finetune_model
from bitfold.run.options import RunOptions
from bitfold.training.adapters import NAME, adapted, add_adapters, start_from
from bitfold.training.finetune import finetune
from bitfold.training.losses import surprise_and_gradient
from bitfold.training.options import Finetuning

peft = pytest.importorskip("peft")

SHORT: dict[str, Any] = {"seqlen": 48, "batch": 2, "rank": 4, "rate": 1e-2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its tokenizer and a text."""
    folder = tiny_lm.folder(tmp_path_factory.mktemp("finetuned") / "source", tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(source: Path) -> Path:
    out = source.with_name("base")
    bitfold.quantize(source, out, format="nf4-g32-dq")
    return out


def how(source: Path, **more: Any) -> Finetuning:
    return Finetuning(str(source / "text.txt"), **{**SHORT, "steps": 12, **more})


def loss(model: Any, text: str) -> float:
    ids = torch.tensor([tiny_lm.tokenizer()(text)["input_ids"][:48]])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_the_gradient_is_that_of_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, words = torch.randn(5, 40, generator=generator), torch.tensor([3, 3, 0, 39, 7])
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, words, reduction="none")
    expected.sum().backward()
    assert wide.grad is not None
    found, gradient = surprise_and_gradient(logits.clone(), words)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(gradient.double(), wide.grad, atol=1e-6)


def test_peft_loads_the_adapter_and_the_text_is_learned(source: Path, base: Path, tmp_path: Path) -> None:
    """What was found at the end is what base and adapter together have."""
    found = finetune(base, tmp_path / "adapter", how(source, steps=30))
    assert found.loss_after < found.loss_before - 0.5
    assert found.layers == 14
    plain = load_folder(base)
    before = loss(plain, tiny_lm.TEXT)
    model = peft.PeftModel.from_pretrained(load_folder(base), tmp_path / "adapter")
    assert loss(model, tiny_lm.TEXT) < before - 0.5
    said = json.loads((tmp_path / "adapter" / "bitfold_report.json").read_text())["finetune"]
    assert said["loss_after"] == found.loss_after
    assert said["data"] == "text.txt"
    assert "/" not in json.dumps({**said, "output": None})


def test_epochs_count_windows(source: Path, base: Path, tmp_path: Path) -> None:
    found = finetune(base, tmp_path / "adapter", how(source, steps=None, epochs=0.2))
    assert found.planned == -(-(found.windows // 5) // 2)


def test_a_start_from_what_rounding_lost(source: Path, tmp_path: Path) -> None:
    """Base and adapter together are nearer the original; at full rank they are the original."""
    bitfold.quantize(source, tmp_path / "q", format="int2-g32")
    original = load_folder(tmp_path / "q"), ModelRef.of(source).load("AutoModelForCausalLM", torch.float32)
    lost = []
    for rank in (4, 32, 64):
        model = load_folder(tmp_path / "q")
        add_adapters(model, how(source, rank=rank), "q")
        start_from(model, ModelRef.of(source), 0)
        error = 0.0
        for path, layer in adapted(model):
            w = layer.get_base_layer().weight.dequantize(torch.float32) + layer.get_delta_weight(NAME)
            error += float((w - original[1].get_submodule(path).weight).square().sum())
        lost.append(error)
    assert lost[0] > 1.5 * lost[1] > 1000 * lost[2]


def test_of_another_original(source: Path, base: Path, tmp_path: Path) -> None:
    other = tiny_lm.folder(tmp_path / "other", tiny_lm.encoder("BertLMHeadModel"))
    with pytest.raises(UsageError, match="no layer"):
        finetune(base, tmp_path / "adapter", how(source), start=other)


def test_a_float_model_is_quantized_first(source: Path, tmp_path: Path) -> None:
    """The base stays beside the adapter, and is what its config names."""
    found = finetune_model(str(source), tmp_path / "a", how(source, steps=2), "int4-g32", None, RunOptions())
    assert found.base == "a-base"
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == tmp_path / "a-base"
    again = finetune_model(str(source), tmp_path / "b", how(source, steps=2), "int4-g32", None, RunOptions())
    assert again.loss_after == found.loss_after


def test_what_is_refused(source: Path, base: Path, tmp_path: Path) -> None:
    """No format for a float model, one for a packed one, layers that are not there, too little memory or text."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="not a folder that bitfold quantized"):
        finetune_model(str(source), out, how(source), None, None, RunOptions())
    with pytest.raises(UsageError, match="quantized already"):
        finetune_model(str(base), out, how(source), "nf4", None, RunOptions())
    with pytest.raises(UsageError, match="no adapters"):
        finetune(base, out, how(source, targets=("nothing_proj",)))
    with pytest.raises(ResourceError, match="are allowed"):
        finetune(base, out, how(source), max_memory=1 << 20)
    (tmp_path / "rows.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(UsageError, match="no text that is known"):
        finetune(base, out, Finetuning(str(tmp_path / "rows.jsonl"), **SHORT))
    with pytest.raises(UsageError, match="no such text file"):
        finetune(base, out, Finetuning(str(tmp_path / "none.txt"), **SHORT))
    for wrong in ({"steps": 0}, {"rank": 0}, {"epochs": 0.0}, {"steps": 1, "minutes": 1.0}, {"rate": -1.0}):
        with pytest.raises(UsageError):
            how(source, **wrong)
    assert not out.exists()


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a fox"},
        {"prompt": "a", "completion": "fox"},
        {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]},
    ],
)
def test_rows_of_data(base: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(60)))
    found = finetune(base, tmp_path / "out", Finetuning(str(tmp_path / "rows.jsonl"), **{**SHORT, "steps": 4}))
    assert found.loss_after < found.loss_before


_RUN = """
import sys
from bitfold.training.finetune import finetune
from bitfold.training.options import Finetuning
how = Finetuning(sys.argv[3], steps=30, seqlen=48, batch=2, rank=4, rate=1e-3)
print(finetune(sys.argv[1], sys.argv[2], how).loss_after)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_it_goes_on_to_the_same_bytes(source: Path, base: Path, tmp_path: Path) -> None:
    command, text = ("-c", _RUN, base), source / "text.txt"
    assert forks.run(*command, tmp_path / "whole", text).returncode == 0
    out, journal = tmp_path / "killed", tmp_path / ".killed.partial" / "journal.jsonl"
    process = forks.Interpreter(*command, out, text)
    while process.poll() is None and not (journal.is_file() and b'"step":14,' in journal.read_bytes()):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert journal.is_file()
    assert forks.run(*command, out, text).returncode == 0
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
