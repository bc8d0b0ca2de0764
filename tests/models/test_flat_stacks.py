"""Experts that a model keeps one upon the other, in the rows of a matrix that it views as a stack: DBRX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.calibration.experts import Listener
from bitfold.checkpoints.convert import convert
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.sites import EXPERTS, find_sites
from bitfold.nn import QWeight
from bitfold.planning import row_slices
from model_zoo import outputs

EXPERT, HIDDEN, INNER = 4, 64, 96
IDS = {"input_ids": torch.arange(9)[None]}


def dbrx() -> nn.Module:
    torch.manual_seed(0)
    inner = {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "moe_num_experts": EXPERT, "moe_top_k": 2}
    config = hf.DbrxConfig(
        d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=257,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, ffn_config=inner,
    )  # fmt: skip
    model: nn.Module = hf.DbrxForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("dbrx") / "m"
    tiny_lm.folder(place, dbrx())
    (place / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return place


def test_sites() -> None:
    """Two matrices are used as they lie, the third the other way round."""
    found = {s.tensor.rpartition(".")[2]: s for s in find_sites(dbrx()) if s.kind == EXPERTS}
    assert {n: (s.experts, s.qshape) for n, s in found.items()} == {
        "w1": (EXPERT, (EXPERT, INNER, HIDDEN)),
        "v1": (EXPERT, (EXPERT, INNER, HIDDEN)),
        "w2": (EXPERT, (EXPERT, HIDDEN, INNER)),
    }
    for site in found.values():
        w = torch.randn(site.shape)
        assert site.oriented(w).shape == site.qshape
        assert torch.equal(site.restored(site.oriented(w)), w)


@pytest.mark.parametrize("format", ["int8", "int4-asym-g32", "fp8", "trellis-4"])
def test_quantized_loaded_and_converted(format: str, folder: Path, tmp_path: Path) -> None:
    """Every expert is quantized along its inputs, runs packed, and comes out as the matrix that it was."""
    report = bitfold.quantize(folder, tmp_path / "q", format=format)
    assert all(t.format for t in report.tensors if "experts" in t.tensor)
    assert report.preflight["rehearsal"] is None
    loaded, model = bitfold.load(tmp_path / "q"), dbrx()
    for site in (s for s in find_sites(model) if s.kind == EXPERTS):
        w = model.get_parameter(site.tensor).detach()
        assert (loaded.get_submodule(site.tensor).dequantize() - w).norm() <= 0.15 * w.norm()
    convert(tmp_path / "q", tmp_path / "p", dtype="float32")
    plain = hf.DbrxForCausalLM.from_pretrained(tmp_path / "p").eval()
    for a, b in zip(outputs(loaded, IDS), outputs(plain, IDS), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_every_expert_is_calibrated(folder: Path, tmp_path: Path) -> None:
    """The tokens of each expert are heard through the view, the slice and the transpose."""
    text = Calibration(str(folder / "text.txt"), nsamples=24, seqlen=32, fisher=False)
    report = bitfold.quantize(folder, tmp_path / "q", format="int4-asym-g32", method="gptq", calibration=text)
    experts = [t for t in report.tensors if "experts" in t.tensor]
    assert len(experts) == 6
    assert all(t.output_error is not None and not t.flags for t in experts)


def test_pieces_are_whole_experts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matrix of experts is never in memory as a whole; no byte changes by it."""
    bitfold.quantize(folder, tmp_path / "whole", format="int4-asym-g32")
    monkeypatch.setattr(row_slices, "WEIGHTS", 2 * INNER * HIDDEN + 1)
    pieces = []
    read = row_slices.read_pieces
    monkeypatch.setattr(row_slices, "read_pieces", lambda *a: (pieces.append(w.shape) or w for w in read(*a)))
    bitfold.quantize(folder, tmp_path / "pieces", format="int4-asym-g32")
    assert (2 * INNER, HIDDEN) in pieces
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "pieces"))
    assert one == other


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_of_experts(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as the matrix; viewed as a stack, it stays packed."""
    w = QWeight(quantize_tensor(torch.randn(4, 48, 64), "int8"), transposed=transposed, flat=True)
    a, b = (64, 48) if transposed else (48, 64)
    plain, x = w.dequantize(), torch.randn(3, b)
    assert w.shape == plain.shape == (4 * a, b)
    for use in (
        lambda v: v.T @ torch.ones(4 * a, 2), lambda v: x @ v.t(), lambda v: v[5], lambda v: v[:3],
        lambda v: v.view(-1, 2), lambda v: v.reshape(4, a, b)[1] + 0, lambda v: nn.functional.linear(x, v),
        lambda v: nn.functional.embedding(torch.tensor([3, 70]), v), lambda v: torch.ones(len(v)),
        lambda v: v.to(torch.float64).sum(), lambda v: list(v.unflatten(0, (4, a)))[1] + 0,
    ):  # fmt: skip
        found = use(w)
        found = found.dequantize() if isinstance(found, QWeight) else found
        torch.testing.assert_close(found, use(plain), rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(QWeight, "dequantize", lambda *_: pytest.fail("dequantized"))
    part = w.view(-1, a, b)[2]
    assert (torch.randn(3, a) @ part if transposed else x @ part.T).shape == (3, 48)


class Watched(nn.Module):
    """Slices turned on the way, and all of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x @ self.w[1].T, x.matmul(self.w[0].transpose(0, 1)), *(x @ p.t() for p in self.w.unbind(0))]


def test_the_listener_follows_slices() -> None:
    module, heard = Watched(), list[int]()
    with torch.no_grad(), Listener(module, ["w"], lambda _name, expert, _x: heard.append(expert)):
        module(torch.randn(3, 4))
    assert heard == [1, 0, 0, 1]


def test_what_nothing_can_quantize_is_said(tmp_path: Path) -> None:
    """Half of XLNet's attention are tensors with a use of their own: at the start, in the report, in the card."""
    config = hf.XLNetConfig(vocab_size=257, d_model=64, n_layer=2, n_head=4, d_inner=96)
    tiny_lm.folder(tmp_path / "m", hf.XLNetLMHeadModel(config))
    report = bitfold.quantize(tmp_path / "m", tmp_path / "q", format="int8")
    said = report.preflight["unknown"]
    assert "rel_attn" in said
    assert f"not quantized: {said}" in (tmp_path / "q" / "README.md").read_text()


def test_little_of_it_is_not_said(folder: Path, tmp_path: Path) -> None:
    assert bitfold.quantize(folder, tmp_path / "q", format="int8").preflight["unknown"] is None
