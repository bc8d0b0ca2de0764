"""Quantizing on every device: what needs no data gives the same bytes, what is calibrated loses as little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bitfold
import tiny_lm
from bitfold.calibration.options import Calibration
from bitfold.errors import UsageError
from bitfold.evaluation import evaluate
from bitfold.run.driver import quantize
from bitfold.system import backend

TEXT = Calibration(tiny_lm.TEXT, nsamples=4, seqlen=32, drift=0.5, fisher=False)

FEW = ["re:.*(mlp|layers.0|[qvo]_proj|embed|head).*"]  # all but the smallest: the search takes a while there


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("devices") / "original", tiny_lm.model())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("words", [{"format": "int4-g32", "fit": "absmax"}, {"format": "nf4-g32"}, {"format": "mxfp4"}])
def test_rounding_to_nearest_writes_the_bytes_of_the_cpu(words, original, tmp_path, device):
    quantize(original, tmp_path / "here", **words)
    quantize(original, tmp_path / "there", **words, device=device)
    here, there = tensors(tmp_path / "here"), tensors(tmp_path / "there")
    assert here.keys() == there.keys()
    different = [name for name in here if not torch.equal(here[name], there[name])]
    assert all(name.endswith(("scale", "codes")) for name in different)  # a searched scale may tie
    assert len(different) <= (0 if words.get("fit") == "absmax" else len(here) // 10)


@pytest.mark.parametrize(
    "words",
    [{"bits": 3, "method": "gptq", "group_size": 32}, {"bits": 2, "method": "trellis", "ignore": FEW}],
    ids=lambda words: words["method"],
)
def test_calibrated_blocks_lose_as_little(words, original, tmp_path, device):
    kl = []
    for name, where in (("here", "cpu"), ("there", device)):
        report = quantize(original, tmp_path / name, **words, act="float", calibration=TEXT, device=where)
        assert not report.fallbacks
        assert any(t.output_error is not None for t in report.tensors)
        found = evaluate(tmp_path / name, original, tiny_lm.TEXT, context=64, max_tokens=512)
        kl.append(found.kl_mean)
    assert kl[1] == pytest.approx(kl[0], rel=0.1)


def test_tensors_in_pieces_are_rounded_there(original, tmp_path, device, monkeypatch):
    from bitfold.planning import row_slices

    monkeypatch.setattr(row_slices, "WEIGHTS", 4096)
    quantize(original, tmp_path / "q", format="int8", device=device)
    assert bitfold.load(tmp_path / "q")


def test_measured_activations_are_measured_there(original, tmp_path, device):
    report = quantize(original, tmp_path / "q", bits=4, method="gptq", act="auto", calibration=TEXT, device=device)
    assert report.acts is not None
    assert not report.fallbacks


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"method": "awq", "bits": 4, "calibration": TEXT}, "factors of input channels"),
        ({"method": "signround", "bits": 4, "calibration": TEXT}, "tunes blocks"),
        ({"format": "e8p"}, "encoded on the CPU"),
        ({"format": "q4_0"}, "encoded on the CPU"),
        ({"bits": 4, "prune": "wanda:0.5", "calibration": TEXT}, "pruned on the CPU"),
        ({"bits": 4, "export": "gptq"}, "--export works on the CPU only"),
        ({"target_bpw": 4.0}, "works on the CPU only"),
        ({"bits": 4, "method": "rtn", "executor": "processes"}, "--executor works on the CPU only"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_an_accelerator_does_not_do_is_refused(words, what, original, tmp_path):
    with pytest.raises(UsageError, match=what):
        quantize(original, tmp_path / "q", **words, device=torch.device("xpu"))
    assert not (tmp_path / "q").exists()


def test_mps_lacks_what_a_hessian_takes(original, tmp_path):
    with pytest.raises(UsageError, match="64 bits"):
        quantize(original, tmp_path / "q", bits=4, method="gptq", calibration=TEXT, device=torch.device("mps"))


def test_running_out_of_the_memory_of_the_device_ends_in_words(original, tmp_path, monkeypatch):
    from bitfold.errors import ResourceError
    from bitfold.run import items

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(items, "quantize_site_tensor", full)
    monkeypatch.setattr(backend, "_CEILINGS", {"xpu": 10**9})
    with pytest.raises(ResourceError, match="of which 1 GB are allowed"):
        quantize(original, tmp_path / "q", bits=8, method="rtn", device=torch.device("xpu"))
