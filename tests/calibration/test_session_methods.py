"""GPTQ, SignRound, Wanda and SparseGPT, and mixtures of experts under calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.calibration import TuningBlock
from bitfold.calibration.one_layer import solve
from bitfold.calibration.signround import tune
from bitfold.errors import BitfoldError, FormatError, RecipeError, UsageError
from bitfold.formats import get_format
from bitfold.methods.fits import get_fit
from bitfold.methods.gptq import MoreDamping, proxy_loss
from bitfold.methods.pruning import Fixed, SparseGPT, read_sparsity, wanda_mask
from bitfold.methods.solvers import get_solver
from bitfold.models.sites import Site
from bitfold.planning.decisions import Quantized
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.recipes.scheme import Scheme, read_scheme
from bitfold.system.tensorinfo import TensorInfo


def inputs(k: int = 64, tokens: int = 600, seed: int = 0) -> torch.Tensor:
    """Correlated, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) * torch.randn(k, generator=generator).exp()
    return x @ (torch.eye(k) + 0.2 * torch.randn(k, k, generator=generator))


def problem(n: int = 24, k: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs(k)
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)), x.T @ x / len(x)


# GPTQ


def test_activation_order_helps_and_keeps_groups_static() -> None:
    """Less loss than from left to right; each weight still lies on the grid of its own group's scale."""
    w, hessian = problem(96)
    format, fit = get_format("int3-g32"), get_fit("mse")
    q = get_solver("gptq")(w, hessian, format, fit)
    left_to_right = get_solver("ldlq")(w, hessian, format, fit)
    nearest = get_solver("rtn")(w, None, format, fit)
    losses = [proxy_loss(w, each.dequantize(), hessian) for each in (q, left_to_right, nearest)]
    assert losses[0] < losses[1] < 0.7 * losses[2]
    params = format.load_params(q.fields, (96, 64))  # type: ignore[attr-defined]
    steps = q.dequantize().view(96, 2, 32) / params.scale[..., None]
    assert torch.allclose(steps, steps.round(), atol=1e-4)


def test_dead_and_singular_inputs() -> None:
    """Inputs that are always zero cost nothing; a matrix that no small damping mends is damped more, and it is said."""
    w, hessian = problem()
    hessian[5], hessian[:, 5] = 0.0, 0.0
    q = get_solver("gptq")(w, hessian, get_format("int4-g32"), get_fit("mse"))
    assert bool((q.dequantize()[:, 5] == 0).all())
    indefinite = hessian - 0.05 * float(hessian.diagonal().mean()) * torch.eye(64)
    with pytest.warns(MoreDamping, match="damping"):
        get_solver("gptq:0.01")(w, indefinite, get_format("int4-g32"), get_fit("mse"))
    _, flags = solve(read_scheme("int4-g32", "gptq:0.01"), w, indefinite, 0, "w")
    assert len(flags) == 1
    assert "instead of 0.01" in flags[0]
    assert solve(read_scheme("int4-g32", "gptq"), w, hessian, 0, "w")[1] == ()
    with pytest.raises(UsageError, match="no damping"):
        get_solver("gptq:a lot")


# Pruning


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("amount", ["0.5", "2:4", "0.25"])
@pytest.mark.parametrize("format", ["bf16", "int4-asym-g32", "nf4"])
def test_zeros_are_zeros(kind: str, amount: str, format: str) -> None:
    """As many as asked for, exactly, and with N:M in every group."""
    w, hessian = problem()
    scheme = read_scheme(format, "gptq" if kind == "sparsegpt" else "rtn", prune=f"{kind}:{amount}")
    q, _ = solve(scheme, w, hessian, 0, "w")
    zeros = q.dequantize() == 0
    share = 0.5 if ":" in amount else float(amount)
    assert float(zeros.float().mean()) >= share - 0.01
    if ":" in amount:
        assert int(zeros.view(24, -1, 4).sum(-1).min()) >= 2
    if format == "bf16":
        assert float(zeros.float().mean()) == pytest.approx(share, abs=0.01)


def test_who_prunes_better() -> None:
    """Magnitude, then Wanda, then those that make up for it, SparseGPT and Wanda's mask with feedback."""
    w, hessian = problem(96)
    half, format, fit = read_sparsity("wanda:0.5"), get_format("fp32"), get_fit("mse")
    assert half is not None
    blind, seeing = wanda_mask(w, None, half), wanda_mask(w, hessian.diagonal(), half)
    fed = get_solver("ldlq")(w, hessian, format, fit, pruner=Fixed(seeing)).dequantize()
    learned = get_solver("gptq")(w, hessian, format, fit, pruner=SparseGPT(half)).dequantize()
    losses = [proxy_loss(w, each, hessian) for each in (w * blind, w * seeing, fed, learned)]
    assert losses[0] > losses[1] > 1.3 * max(losses[2:])
    assert torch.equal(fed == 0, ~seeing)


def test_the_first_mask_is_the_least_loss() -> None:
    """With independent inputs SparseGPT is Wanda over the block: the smallest (w |x|)^2 go, the others stay."""
    w, _ = problem()
    diagonal = torch.rand(64) + 0.1
    half = read_sparsity("sparsegpt:0.5")
    assert half is not None
    q = get_solver("ldlq:1e-6")(w, diagonal.diag(), get_format("fp32"), get_fit("mse"), pruner=SparseGPT(half))
    expected = w * half.mask(w.square() * diagonal, by_row=False)
    assert torch.allclose(q.dequantize(), expected, atol=1e-5)


def test_what_cannot_be_pruned() -> None:
    """Formats without a zero say so; so do nonsense amounts."""
    w, hessian = problem(32)
    for format in ("trellis-2", "int1-g32"):
        with pytest.raises(FormatError, match="no zero"):
            solve(read_scheme(format, "ldlq", prune="wanda:0.5"), w, hessian, 0, "w")
    for text in ("wanda:2", "wanda:0", "magnitude:0.5", "sparsegpt:4:4", "wanda:1:0", "wanda:a"):
        with pytest.raises(BitfoldError, match="pruning"):
            Rule("*", "int8", "ldlq", prune=text)
    with pytest.raises(RecipeError, match="feeds errors forward"):
        Rule("*", "int8", prune="sparsegpt:0.5")


# SignRound


def decision(name: str, layer: nn.Linear, scheme: Scheme) -> Quantized:
    shape = tuple(layer.weight.shape)
    return Quantized(name, TensorInfo(torch.float32, shape), "", Site(f"{name}.weight", "linear", shape), scheme)


@pytest.mark.parametrize(("format", "most"), [("int2-asym-g32", 0.8), ("int3-g32", 0.9), ("int4-affine-g32", 0.95)])
def test_signround_learns_and_never_loses(format: str, most: float) -> None:
    """The output of a small block, against the original's, before and after; weights stay within a few steps."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64))
    windows = list(inputs(64, 512).view(8, 64, 64) * 0.2)
    with torch.no_grad():
        targets = [block(x) for x in windows]
    start = [
        get_solver("rtn")(m.weight.detach(), None, get_format(format), get_fit("mse")) for m in (block[0], block[2])
    ]

    def loss() -> float:
        with torch.no_grad():
            return sum(float((block(x) - y).square().mean()) for x, y in zip(windows, targets, strict=True))

    original = [block[0].weight, block[2].weight]
    block[0].weight, block[2].weight = (nn.Parameter(q.dequantize()) for q in start)
    before = loss()
    block[0].weight, block[2].weight = original
    whole = TuningBlock(block, lambda _i, x: block(x), windows, targets)
    scheme = read_scheme(format, "signround:120")
    found = list(tune(whole, {"0": decision("0", block[0], scheme), "2": decision("2", block[2], scheme)}, seed=0))
    assert loss() < most * before
    for (_, q, _), layer, was in zip(found, (block[0], block[2]), original, strict=True):
        assert torch.equal(layer.weight, q.dequantize())
        step = (layer.weight - was).detach().abs().max()
        assert float(step) < 10 * float((start[0].dequantize() - original[0].detach()).abs().max())


def test_signround_keeps_a_start_that_cannot_be_improved() -> None:
    """Weights on the grid already: any move loses, so nothing moves."""
    layer = nn.Linear(32, 16, bias=False)
    q = get_solver("rtn")(layer.weight.detach(), None, get_format("int4-g32"), get_fit("absmax"))
    layer.weight = nn.Parameter(q.dequantize())
    windows = [torch.randn(20, 32) for _ in range(3)]
    targets = [layer(x).detach() for x in windows]
    whole = TuningBlock(nn.ModuleDict({"a": layer}), lambda _i, x: layer(x), windows, targets)
    scheme = read_scheme("int4-g32", "signround:5", fit="absmax")
    ((_, found, _),) = tune(whole, {"a": decision("a", layer, scheme)}, seed=0)
    assert torch.equal(found.dequantize(), q.dequantize())
    with pytest.raises(FormatError, match="evenly spaced"):
        list(tune(whole, {"a": decision("a", layer, read_scheme("nf4-g32", "signround"))}, seed=0))


# In whole models


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_text(tmp_path_factory.mktemp("methods") / "source", tiny_lm.model())


def with_text(folder: Path, model: nn.Module) -> Path:
    tiny_lm.folder(folder, model)
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


def run(source: Path, out: Path, rule: Rule) -> bitfold.records.run_report.QuantizeReport:  # type: ignore[name-defined]
    text = Calibration(str(source / "text.txt"), nsamples=6, seqlen=48, drift=0.0, fisher=False)
    return bitfold.quantize(source, out, recipe=Recipe((rule,)), calibration=text if rule.needs_text else None)


def loss(folder: Path, source: Path) -> float:
    found = bitfold.evaluate(str(folder), str(source), tiny_lm.TEXT[:2000], context=64, max_tokens=512)
    assert found.kl_mean is not None
    return found.kl_mean


@pytest.mark.parametrize("method", ["gptq", "signround:60"])
def test_whole_models(source: Path, tmp_path: Path, method: str) -> None:
    """Closer to the original than rounding to nearest on the text of the calibration."""
    run(source, tmp_path / "rtn", Rule("*", "int3-g32"))
    report = run(source, tmp_path / "out", Rule("*", "int3-g32", method))
    assert len(report.quantized) == 14
    assert loss(tmp_path / "out", source) < 0.9 * loss(tmp_path / "rtn", source)


def test_pruned_models_are_ordinary_ones(source: Path, tmp_path: Path) -> None:
    """SparseGPT without quantization: a plain bf16 checkpoint with half of each linear layer zero."""
    run(source, tmp_path / "out", Rule("*", "bf16", "gptq", prune="sparsegpt:2:4"))
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            assert float((module.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


MOE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
}
SHORT_MOE = {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": SHORT_MOE,
    "GptOss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 16},
}


def moe(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**MOE, **FAMILIES[family])
    model: nn.Module = getattr(hf, f"{family}ForCausalLM")(config).eval()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_gets_its_hessian(family: str, tmp_path: Path) -> None:
    """Stacks of experts under feedback beat rounding, report the error of their output, and load as they were."""
    source = with_text(tmp_path / "source", moe(family))
    nearest = Recipe((Rule("*", "int3-g16"),))
    bitfold.quantize(source, tmp_path / "rtn", recipe=nearest)
    report = run(source, tmp_path / "out", Rule("*", "int3-g16", "gptq"))
    stacks = [t for t in report.quantized if len(t.shape) == 3]
    assert len(stacks) == 4
    assert all(t.output_error is not None and 0 < t.output_error < 1 for t in stacks)
    assert loss(tmp_path / "out", source) < 0.9 * loss(tmp_path / "rtn", source)


def test_an_expert_without_tokens_is_named(tmp_path: Path) -> None:
    """It is quantized as it would be without data, the others are not."""
    source = with_text(tmp_path / "source", moe("Qwen3Moe"))
    few = Calibration(str(source / "text.txt"), nsamples=1, seqlen=24, drift=0.0, fisher=False)
    report = bitfold.quantize(source, tmp_path / "out", format="int4-g16", method="gptq", calibration=few)
    flags = [flag for t in report.quantized if len(t.shape) == 3 for flag in t.flags if "without data" in flag]
    assert flags
    assert all(flag.startswith("expert ") and "tokens reached it" in flag for flag in flags)
