"""Methods from name to logits: quantize a folder, load it, compare with the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitfold
import tiny_lm
from bitfold.calibration.options import Calibration
from bitfold.nn import QWeight

# Name, bits (None: the method's own), format, whether inputs are rotated, largest relative square error of a weight.
RUNS = [
    ("hqq", 4, "int4-affine-g64", False, 0.012),
    ("nf4", None, "nf4-dq", False, 0.012),
    ("llm-int8", None, "int8", False, 1e-4),
    ("quip", 3, "int3-affine", True, 0.12),
    ("quip-sharp", None, "e8p", True, 0.3),
    ("aqlm", 2, "aqlm-2x8", False, 0.3),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    return tiny_lm.folder(tmp_path_factory.mktemp("catalog") / "source", tiny_lm.model())


@pytest.mark.parametrize(("name", "bits", "format", "rotated", "worst"), RUNS, ids=[r[0] for r in RUNS])
def test_method_from_name_to_logits(
    source: Path, tmp_path: Path, name: str, bits: int | None, format: str, rotated: bool, worst: float
) -> None:
    """The layers are of the method's format, in its basis, near the original weights, and they run."""
    text = tmp_path / "text.txt"
    text.write_text(tiny_lm.TEXT, encoding="utf-8")
    calibrated = name in ("quip", "quip-sharp", "aqlm")
    calibration = Calibration(str(text), nsamples=4, seqlen=64) if calibrated else None
    text_options = {"calibration": calibration, "keep_embeddings": True}
    report = bitfold.quantize(source, tmp_path / "out", method=name, bits=bits, **text_options)
    assert {t.format for t in report.tensors} == {None, format}
    model = bitfold.load(tmp_path / "out")
    weights = {name: m for name, m in model.named_modules() if isinstance(m, QWeight)}
    assert len(weights) == 14
    originals = dict(tiny_lm.model().named_parameters())
    for where, weight in weights.items():
        assert (weight.transform is not None) == rotated
        w = originals[where]
        # Error feedback takes errors of weights for errors of outputs: it may double the former.
        assert float((weight.dequantize() - w).square().sum() / w.square().sum()) < worst
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([list(tiny_lm.TEXT.encode()[:64])])).logits).all()
