"""Factors of input channels: SmoothQuant and AWQ, in norms and at run time, static activation scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import bitfold
import model_zoo
import tiny_lm
from bitfold import Calibration
from bitfold.calibration import Statistics
from bitfold.calibration.channel_factors import find_factors
from bitfold.checkpoints.inspection import inspect
from bitfold.errors import RecipeError, UsageError
from bitfold.formats import get_format
from bitfold.methods.fits import minmax
from bitfold.methods.rtn import rtn
from bitfold.models import skeleton
from bitfold.models.folding import find_folds, folded_norm, scales_with_weight
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.transforms import (
    Diagonal,
    Hadamard,
    Transform,
    TransformSpec,
    read_transform,
    smooth_scale,
    transform_spec,
)
from numerics import check_same_answers, check_same_tensors

OUTLIER, FACTOR = 7, 60.0


def statistics(x: torch.Tensor) -> Statistics:
    hessian = x.T @ x / len(x)
    return Statistics(hessian, hessian.clone(), len(x), x.abs().amax(0), x.abs().mean(0))


@pytest.mark.parametrize("transform", [Hadamard(24, 3), Diagonal.stored(torch.rand(24) * 3 + 0.1)], ids=["h", "d"])
def test_transforms_leave_the_product_alone(transform: Transform) -> None:
    """x W^T, W there and back, the Hessian of the new inputs, and the way through a checkpoint; in float64."""
    torch.manual_seed(0)
    x, w = torch.randn(50, 24, dtype=torch.float64), torch.randn(9, 24, dtype=torch.float64)
    turned, weights = transform(x), transform.weights(w)
    assert torch.allclose(turned @ weights.T, x @ w.T, atol=1e-6)
    assert torch.allclose(transform.inverse(weights), w, atol=1e-6)
    assert torch.allclose(transform.hessian(x.T @ x), turned.T @ turned, atol=1e-5)
    described = read_transform(transform.describe())
    assert described is not None
    assert torch.equal(described.with_fields(transform.fields())(x), turned)
    assert {name: (f.dtype, tuple(f.shape)) for name, f in transform.fields().items()} == {
        name: (i.dtype, i.shape) for name, i in transform.layout().items()
    }


def test_smooth_factors_split_the_range() -> None:
    """At one half, the largest |x| and |w| of each channel meet; dead channels keep a factor of one."""
    absmax, weight = torch.tensor([60.0, 1.0, 0.0, 4.0]), torch.tensor([0.5, 0.25, 1.0, 0.0])
    s = smooth_scale(absmax, weight, 0.5)
    assert torch.allclose((absmax * s)[:2], (weight / s)[:2])
    assert s[2:].tolist() == [1, 1]
    assert torch.allclose((absmax * smooth_scale(absmax, weight, 1.0))[:2], torch.ones(2))


def test_the_search_never_loses_and_finds_what_matters() -> None:
    """AWQ under inputs of which one channel in sixteen is large: the loss falls, these channels get larger weights."""
    torch.manual_seed(0)
    x = torch.randn(400, 128)
    x[:, ::16] *= 30
    w = torch.randn(48, 128)
    known, format = statistics(x), get_format("int3-g64")
    scale = find_factors(TransformSpec("awq"), [w[:20], w[20:]], known, format)
    assert scale is not None
    assert float(scale[::16].max()) < float(scale[1::16].min())

    def loss(transform: Diagonal | None) -> float:
        coded = rtn(w if transform is None else transform.weights(w), None, format, minmax).dequantize()
        back = coded if transform is None else transform.inverse(coded)
        return float(((w - back) @ x.T).square().sum())

    assert loss(Diagonal.stored(scale)) < 0.6 * loss(None)
    assert find_factors(TransformSpec("awq"), [w], Statistics(known.hessian, known.cross, 400), format) is None


# Norms, and pairs of linear layers: value and output projection where each head has its own values, up and down.
FOLDABLE = {"llama": (4, 2), "llama-heads": (4, 4), "opt": (4, 4), "qwen2": (4, 2), "gemma3": (4, 2), "mixtral": (2, 0)}
FOLDABLE |= {"gpt2": (0, 0)}


def family_model(family: str) -> Any:
    """The family's model of the zoo; a llama with as many heads of values as of queries, or an OPT, beside them."""
    if family == "llama-heads":
        return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=4)).eval()
    if family == "opt":
        return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)).eval()
    return model_zoo.ZOO[family].build()


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


@pytest.mark.parametrize(("family", "counts"), FOLDABLE.items())
def test_what_feeds_only_linear_layers_is_found(family: str, counts: tuple[int, int]) -> None:
    """And scales the model's own function: with everything folded, logits stay."""
    torch.manual_seed(0)
    model = family_model(family).float()
    folds = find_folds(skeleton.build(type(model), model.config))
    inside = {source: layers for source, layers in folds.items() if ".layers." in source}
    linear = [source for source in inside if isinstance(model.get_submodule(source), nn.Linear)]
    assert (len(inside) - len(linear), len(linear)) == counts
    ids = torch.arange(24)[None]
    with torch.no_grad():
        before = model(ids).logits
        for source, layers in inside.items():
            module = model.get_submodule(source)
            scale = torch.rand(len(module.weight)) * 4 + 0.2
            if source in linear:
                changed = {name: p * scale.view(-1, *[1] * (p.dim() - 1)) for name, p in module.named_parameters()}
            else:
                found = folded_norm(module, scale)
                assert found is not None
                changed = found[0]
            for name, value in changed.items():
                module._parameters[name] = nn.Parameter(value)
            for layer in layers:
                model.get_submodule(layer).weight.data /= scale
        assert torch.allclose(model(ids).logits, before, atol=1e-4 * float(before.abs().max()))


def test_channels_are_followed_only_where_their_factors_pass() -> None:
    """A function that bends, a sum, a square, a broadcast product and a reshape across channels see the factors."""

    class Between(nn.Module):
        def __init__(self, between: Any) -> None:
            super().__init__()
            self.first, self.second, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            x = self.between(self.first(input_ids[..., None].float().expand(1, 4, 8)))
            return self.second(x)

    def found(between: Any) -> bool:
        return "first" in find_folds(Between(between).to("meta"))

    pieces = torch.rand(1, 4, 8, device="meta")
    passing = [lambda x: x * 2, lambda x: x * pieces, torch.relu, lambda x: x.view(1, 4, 2, 4).reshape(1, 4, 8)]
    passing += [lambda x: x.view(1, 4, 2, 4).transpose(1, 2).contiguous().transpose(1, 2).reshape(1, 4, 8)]
    seeing = [
        torch.tanh,
        lambda x: x + pieces,
        lambda x: x * x,
        lambda x: x * x[:, :1],
        lambda x: x.mT.reshape(1, 4, 8),
    ]
    seeing += [lambda x: x.view(1, 4, 2, 4).transpose(2, 3).reshape(1, 4, 8), lambda x: x.flip(-1), lambda x: x.mT @ x]
    assert all(found(between) for between in passing)
    assert not any(found(between) for between in seeing)


def test_norms_that_do_not_scale_with_their_weight_are_not_believed() -> None:
    """Layer norms with bias scale, a norm that squashes afterwards does not."""

    class Squashed(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).tanh()

    assert scales_with_weight(nn.LayerNorm(16, device="meta"))
    assert not scales_with_weight(Squashed(16, device="meta"))


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with one channel of each norm times 60 and the weights behind it divided: the same function."""
    folder = tmp_path_factory.mktemp("factors") / "outlier"
    model: Any = tiny_lm.model()
    with torch.no_grad():
        for block in model.model.layers:
            pairs = [(block.input_layernorm, [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj])]
            pairs += [(block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj])]
            for norm, layers in pairs:
                norm.weight[OUTLIER] *= FACTOR
                for layer in layers:
                    layer.weight[:, OUTLIER] /= FACTOR
    tiny_lm.folder(folder, model)
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


def loss(folder: Path, source: Path) -> float:
    found = bitfold.evaluate(str(folder), str(source), tiny_lm.TEXT[:2000], context=64, max_tokens=512)
    assert found.kl_mean is not None
    return found.kl_mean


SHORT = {"nsamples": 6, "seqlen": 48, "fisher": False, "drift": 0.0}


def quantized(source: Path, out: Path, **rule: str) -> Path:
    recipe = Recipe((Rule("*", **rule),))
    text = Calibration(str(source / "text.txt"), **SHORT) if recipe.rules[0].needs_text else None  # type: ignore[arg-type]
    bitfold.quantize(source, out, recipe=recipe, calibration=text)
    return out


@pytest.mark.parametrize("act", ["int8", "int8-static"])
def test_smoothquant_repairs_what_an_outlier_breaks(outlier: Path, tmp_path: Path, act: str) -> None:
    """W8A8 with a channel times 60, activations rounded for each token or with one scale for the layer."""
    bare = quantized(outlier, tmp_path / "bare", format="int8", act=act, fit="absmax")
    smooth = quantized(outlier, tmp_path / "smooth", format="int8", act=act, fit="absmax", transform="smooth:0.5")
    broken, repaired = loss(bare, outlier), loss(smooth, outlier)
    assert repaired < 0.2 * broken
    if act == "int8-static":
        weights = bitfold.load(smooth).get_submodule("model.layers.0.mlp.down_proj").weight
        assert float(weights.act_scale) > 0


def test_what_is_stored_and_how_it_loads(outlier: Path, tmp_path: Path) -> None:
    """Norms and up projections take the factors of what they feed; output projections, whose heads share values, store
    theirs. Both loaders and `convert` agree."""
    folder = quantized(outlier, tmp_path / "q", format="int8", transform="smooth:0.5", act="int8")
    names = set(bitfold.checkpoints.bitfold_folder.SafetensorsSource(folder).names())
    scaled = {name.split(".")[-2 - 1] for name in names if name.endswith("input_scale")}
    assert scaled == {"o_proj"}
    ours, plain = bitfold.load(folder), LlamaForCausalLM.from_pretrained(outlier)
    norm = "model.layers.0.input_layernorm"
    ratio = ours.get_submodule(norm).weight.detach() / plain.get_submodule(norm).weight.detach()
    assert float(ratio[OUTLIER]) < 0.3 * float(ratio.median())
    ids = torch.arange(40)[None]
    bitfold.checkpoints.convert(folder, tmp_path / "plain", dtype="float32")
    with torch.no_grad():
        logits = ours(ids).logits
        check_same_answers(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, logits)
        back = LlamaForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
        original = plain(ids).logits
    spread = float(original.std())
    assert float((back - original).std()) < 0.1 * spread
    assert float((logits - original).std()) < 0.2 * spread
    report = inspect(folder)
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert 0 <= stored - sum(t.nbytes for t in report.tensors) < 20_000  # the header
    bitfold.save(ours, tmp_path / "again")
    with torch.no_grad():
        again = bitfold.load(tmp_path / "again")
        check_same_tensors(again, ours)
        check_same_answers(again(ids).logits, logits)


def test_awq_beats_rounding(outlier: Path, tmp_path: Path) -> None:
    """At 3 bits, with and without clipping under the Hessian; each a part of its gain."""
    bare = loss(quantized(outlier, tmp_path / "a", format="int3-g32"), outlier)
    scaled = loss(quantized(outlier, tmp_path / "b", format="int3-g32", transform="awq"), outlier)
    clipped = loss(quantized(outlier, tmp_path / "c", format="int3-g32", transform="awq", fit="clip"), outlier)
    assert scaled < 0.9 * bare
    assert clipped < 0.9 * bare


def test_nonsense() -> None:
    """Names of transforms."""
    assert transform_spec("smooth:0.85") == TransformSpec("smooth", 0.85)
    for text in ("smoth", "smooth:2", "smooth:", "awq:0.5", "hadamard:3"):
        with pytest.raises(UsageError):
            transform_spec(text)
    with pytest.raises(RecipeError, match="without a rotation"):
        Rule("*", "int8", transform="hadamard", act="int8-static")
    with pytest.raises(UsageError, match="needs calibration"):
        bitfold.quantize_(nn.Sequential(nn.Linear(8, 8)), Recipe.of("int8", transform="awq"))
