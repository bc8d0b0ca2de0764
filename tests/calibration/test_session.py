"""Calibrated quantization of a small model: the walk over its blocks, the statistics, the files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.calibration import (
    BlockWalk,
    Statistics,
    Text,
    calibration_tokens,
    fisher,
    tail,
    token_weights,
    walk_shape,
)
from bitfold.calibration.probe import ActivationCost
from bitfold.errors import BitfoldError, UsageError
from numerics import check_all_same_answers, check_same_answers

SHORT: dict[str, Any] = {"nsamples": 6, "seqlen": 48}


def loss(folder: Path, source: Path) -> float:
    """KL from the original over the text."""
    text = tiny_lm.TEXT[:3000]
    found = bitfold.evaluate(str(folder), str(source), text, context=64, max_tokens=1024)
    assert found.kl_mean is not None
    return found.kl_mean


@pytest.mark.parametrize("format", ["int3-asym-g32", "nf4", "trellis-2"])
def test_feedback_beats_rounding(source: Path, tmp_path: Path, format: str) -> None:
    """On the text it was calibrated on, by a margin; every layer reports the error of its output."""
    text = str(source / "text.txt")
    bitfold.quantize(source, tmp_path / "rtn", format=format, transform="hadamard")
    settings = Calibration(text, **SHORT, drift=0.5, fisher=True)
    report = bitfold.quantize(source, tmp_path / "ldlq", format=format, method="ldlq", calibration=settings)
    assert len(report.quantized) == 14
    assert all(t.output_error is not None and 0 < t.output_error < 1 for t in report.quantized)
    assert loss(tmp_path / "ldlq", source) < 0.9 * loss(tmp_path / "rtn", source)


def test_both_loaders_agree_and_bytes_repeat(source: Path, tmp_path: Path) -> None:
    """The rotation is stored and applied by both ways of loading; the same seed gives the same bytes."""
    settings = Calibration(str(source / "text.txt"), **SHORT)
    for name in "ab":
        bitfold.quantize(source, tmp_path / name, format="int4-g32", method="ldlq", calibration=settings, seed=3)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = bitfold.load(tmp_path / "a")(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a")(ids).logits
    check_same_answers(ours, theirs)
    bitfold.checkpoints.convert(tmp_path / "a", tmp_path / "plain", dtype="float32")
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    assert torch.allclose(ours, plain, atol=1e-4 * float(plain.abs().max()))


def test_own_text(source: Path, tmp_path: Path) -> None:
    """No text at all: the model writes it."""
    settings = Calibration("self", nsamples=3, seqlen=24, fisher=False)
    report = bitfold.quantize(source, tmp_path / "out", format="int4-g32", method="ldlq", calibration=settings)
    assert all(t.output_error is not None for t in report.quantized)


SLIDING = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
FAMILIES = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": SLIDING, "Gemma2ForCausalLM": {"sliding_window": 8}}


@pytest.mark.parametrize("family", [*FAMILIES, "GPT2LMHeadModel"])
def test_the_walk_is_the_model(family: str) -> None:
    """Unquantized, the stream between the blocks is the model's own hidden states, whatever mask each block gets."""
    cls: Any = getattr(transformers, family)
    sizes = {"vocab_size": 64, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16}
    if family == "GPT2LMHeadModel":
        sizes = {"vocab_size": 64, "n_layer": 3, "n_embd": 32, "n_head": 2}
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes, **FAMILIES.get(family, {}))).eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ids = torch.arange(40)[None] % 64
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states

    class Whole(dict[str, torch.Tensor]):
        read_rows = None

        def read(self, name: str) -> torch.Tensor:
            return self[name].detach().clone()

    walk = BlockWalk(copy.deepcopy(model), Whole(state), walk_shape(model).chains[0], Text(ids))
    walk.start()
    for index in range(len(walk)):
        assert torch.allclose(walk._original[0], expected[index], atol=1e-5)
        list(walk.block(index, []))


def test_the_target_is_the_least_squares_solution() -> None:
    """At full strength and without damping, W' minimises |W f - W' x|^2: checked against lstsq."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(400, 24, generator=generator)
    x = f + 0.3 * torch.randn(400, 24, generator=generator)
    w = torch.randn(5, 24, generator=generator)
    found = Statistics(x.T @ x / 400, f.T @ x / 400, 400).target(w, 1.0, damp=0.0)
    best = torch.linalg.lstsq(x.double(), (f @ w.T).double()).solution.T
    assert torch.allclose(found.double(), best, atol=1e-4)
    assert torch.equal(Statistics(x.T @ x, f.T @ x, 400).target(w, 0.0, damp=0.0), w)


def test_token_weights(source: Path) -> None:
    """Mean one before clipping, one for each token, and the same for the same seed."""
    model = LlamaForCausalLM.from_pretrained(source)
    ids = calibration_tokens(source, str(source / "text.txt"), **SHORT)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    first, second = (token_weights(model, names, ids, seed=1) for _ in range(2))
    assert set(first) == set(names)
    for name in names:
        assert first[name].shape == (6, 48)
        assert torch.equal(first[name], second[name])
        assert 0.5 < float(first[name].mean()) <= 1.001
        assert float(first[name].max()) <= 50


@pytest.mark.parametrize("chunk", [7, 128])
def test_token_weights_are_those_of_the_cross_entropy(
    source: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """The hand-made gradient of the logits, a few tokens at a time, against autograd through torch's cross entropy.

    The weights are its root mean square over the outputs of the layer.
    """
    model = LlamaForCausalLM.from_pretrained(source).eval()
    ids = calibration_tokens(source, str(source / "text.txt"), nsamples=3, seqlen=48)
    monkeypatch.setattr(tail, "_CHUNK", chunk)
    name = "model.layers.0.self_attn.o_proj"
    seen: list[torch.Tensor] = []
    drawn = fisher.drawn

    def draw(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(drawn(p, generator))
        return seen[-1]

    monkeypatch.setattr(fisher, "drawn", draw)
    found = token_weights(model, [name], ids, seed=1)[name]
    model.get_submodule(name).register_full_backward_hook(lambda _m, _i, out: gradients.append(out[0]))
    gradients: list[torch.Tensor] = []
    labels = torch.cat(seen)[:, 0].view(ids.shape)
    for sample, label in zip(ids, labels, strict=True):
        hidden = model.get_input_embeddings()(sample[None]).detach().requires_grad_(True)
        nn.functional.cross_entropy(model(inputs_embeds=hidden).logits[0], label, reduction="sum").backward()
    expected = torch.stack([g[0].square().mean(-1).sqrt() for g in gradients])
    assert torch.allclose(found, (expected / expected.mean()).clamp(max=50), rtol=1e-3)


def test_labels_are_drawn_by_their_probability() -> None:
    """Shares of many draws within five standard deviations; what is impossible is never drawn, at either end."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    found = fisher.drawn(p.expand(1 << 14, -1), torch.Generator().manual_seed(3))[:, 0]
    shares = torch.bincount(found, minlength=len(p)) / len(found)
    assert (shares[p == 0] == 0).all()
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / len(found)).sqrt()).all()


def test_texts(source: Path, tmp_path: Path) -> None:
    """Text and JSON lines; too little of it, none at all, something else."""
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one two three four five"}\n\n{"text": "six seven eight"}\n', encoding="utf-8")
    assert calibration_tokens(source, str(lines), nsamples=9, seqlen=8).shape == (5, 8)
    with pytest.raises(UsageError, match="one sample needs 4096"):
        calibration_tokens(source, str(lines), nsamples=1, seqlen=4096)
    with pytest.raises(UsageError, match="no such text file"):
        calibration_tokens(source, str(tmp_path / "none.txt"), nsamples=1, seqlen=8)
    lines.write_text('{"other": 1}', encoding="utf-8")
    with pytest.raises(UsageError, match="line 1 has no text that is known by its name; its columns: `other`"):
        calibration_tokens(source, str(lines), nsamples=1, seqlen=8)


def test_refusals(source: Path, tmp_path: Path) -> None:
    """Calibration without a solver that uses it, nonsense numbers, formats that cannot be coded by columns."""
    with pytest.raises(UsageError, match="no rule uses"):
        bitfold.quantize(source, tmp_path / "out", format="int4", calibration="default")
    with pytest.raises(UsageError, match="drift"):
        Calibration(drift=2.0)
    with pytest.raises(BitfoldError, match="column by column"):
        bitfold.quantize(
            source, tmp_path / "out", format="ggml_mxfp4", method="ldlq", calibration=Calibration("default", **SHORT)
        )
    assert not (tmp_path / "out").exists()


def test_finished_parts_answer_from_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention runs for the original, for its own two groups and once more; every statistic stays as it was."""
    config = transformers.AutoConfig.from_pretrained(source)
    whole = LlamaForCausalLM.from_pretrained(source).eval()
    ids = torch.arange(96).view(2, 48) % config.vocab_size
    layers = [n for n, m in whole.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.0.")]

    class Whole(dict[str, torch.Tensor]):
        read_rows = None

        def read(self, name: str) -> torch.Tensor:
            return self[name].detach().clone()

    def measure() -> tuple[list[torch.Tensor], torch.Tensor, int]:
        model, calls = copy.deepcopy(whole), 0
        walk = BlockWalk(model, Whole(whole.state_dict()), walk_shape(whole).chains[0], Text(ids))
        walk.start()
        attention = type(model.model.layers[0].self_attn)
        real = attention.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*args, **kwargs)

        found = []
        with monkeypatch.context() as patch:
            patch.setattr(attention, "forward", counted)
            for group, statistics in walk.block(0, layers):
                found.append(statistics[0].hessian)
                for layer in group:
                    model.get_submodule(layer).weight.data.mul_(0.9)
        return found, walk.streams["quantized"][0], calls

    with monkeypatch.context() as patch:
        patch.setattr("bitfold.calibration.finished.AnswerReplay.replay", lambda *_: None)
        slow = measure()
    fast = measure()
    check_all_same_answers([*fast[0], fast[1]], [*slow[0], slow[1]])
    assert fast[2] < slow[2]


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_the_probe_measures_int8_activations(family: str) -> None:
    """Against the whole model, its inputs rounded by hooks and its logits compared at once; weights quantized alike."""
    cls: Any = getattr(transformers, family)
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16}
    if family == "GPT2LMHeadModel":
        sizes = {"vocab_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 2}
    torch.manual_seed(0)
    original = cls(cls.config_class(**sizes)).eval()
    changed, state = copy.deepcopy(original), {**dict(original.named_parameters()), **dict(original.named_buffers())}
    ids = torch.arange(300).view(1, 300) * 7 % 64

    def coarse(x: torch.Tensor) -> torch.Tensor:
        return (x * 4).round() / 4

    class Whole(dict[str, torch.Tensor]):
        read_rows = None

        def read(self, name: str) -> torch.Tensor:
            return self[name].detach().clone()

    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    layers = [n for n, m in changed.named_modules() if isinstance(m, kinds) and "head" not in n]
    walk = BlockWalk(copy.deepcopy(original), Whole(state), walk_shape(original).chains[0], Text(ids))
    walk.start()
    walk.watch(lambda _name: coarse)
    for index in range(len(walk)):
        for group, _ in walk.block(index, [n for n in layers if n.startswith(walk.inside(index))]):
            for name in group:
                for model in (walk.model, changed):
                    model.get_submodule(name).weight.data.mul_(0.8)
    found = walk.acts(lambda _model: None)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits[0].log_softmax(-1)

    truth, plain = logits(original), logits(changed)
    for name in layers:
        changed.get_submodule(name).register_forward_pre_hook(lambda _m, inputs: (coarse(inputs[0]),))
    for got, stream in ((found.kl_float, plain), (found.kl_int8, logits(changed))):
        expected = float((truth.exp() * (truth - stream)).sum(-1).mean())
        assert got == pytest.approx(expected, rel=1e-3)
    assert found.tokens == 300
    assert found.kl_int8 > found.kl_float > 0


def test_the_choice_of_activations() -> None:
    """int8 is taken where it costs at most a twentieth more."""
    assert ActivationCost(0.1, 0.1049, 10).choice == "int8"
    assert ActivationCost(0.1, 0.1051, 10).choice == "float"
    assert ActivationCost(float("nan"), float("nan"), 10).choice == "float"


def test_activations_left_to_measurement(source: Path, tmp_path: Path) -> None:
    """The choice is stored with every layer, is what the report says, and either kind of activations still runs."""
    settings = Calibration(str(source / "text.txt"), **SHORT, fisher=False)
    options: dict[str, Any] = {"format": "trellis-3", "method": "ldlq", "transform": "hadamard"}
    report = bitfold.quantize(source, tmp_path / "out", **options, act="auto", calibration=settings)
    assert report.acts is not None
    assert report.acts["tokens"] == 2 * 48
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {t.get("act", "float") for t in config["tensors"].values()} == {report.acts["choice"]}
    assert config["activations"] == report.acts
    ids = torch.arange(40)[None]
    logits = []
    for act in ("float", "int8"):
        bitfold.quantize(source, tmp_path / act, **options, act=act, calibration=settings)
        with torch.no_grad():
            logits.append(bitfold.load(tmp_path / act)(ids).logits)
    largest = float(logits[0].abs().max())
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3 * largest  # eight bits are seen
    with torch.no_grad():
        chosen = bitfold.load(tmp_path / "out")(ids).logits
    check_same_answers(chosen, logits[report.acts["choice"] == "int8"])


@pytest.mark.parametrize("tied", [False, True])
def test_the_measured_kl_is_that_of_the_result(tmp_path: Path, tied: bool) -> None:
    """What the probe says of float activations is what the finished folder shows on the same tokens."""
    config = copy.deepcopy(tiny_lm.model().config)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    original = LlamaForCausalLM(config).eval()
    tiny_lm.folder(tmp_path / "source", original)
    (tmp_path / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    settings = Calibration(str(tmp_path / "text.txt"), nsamples=2, seqlen=48, fisher=False)
    options: dict[str, Any] = {"format": "int4-g32", "method": "ldlq", "calibration": settings}
    report = bitfold.quantize(tmp_path / "source", tmp_path / "auto", **options, act="auto")
    bitfold.quantize(tmp_path / "source", tmp_path / "float", **options)
    assert report.acts is not None
    ids = calibration_tokens(tmp_path / "source", settings.text, nsamples=2, seqlen=48)
    with torch.no_grad():
        truth, found = (
            model(ids).logits.float().log_softmax(-1) for model in (original, bitfold.load(tmp_path / "float"))
        )
    expected = float((truth.exp() * (truth - found)).sum(-1).mean())
    assert report.acts["kl_float"] == pytest.approx(expected, rel=0.01)


def test_overflowing_activations(tmp_path: Path) -> None:
    """A model that overflows on the text is quantized without data, said with the names; strict runs stop."""
    model = tiny_lm.model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
        model.model.layers[0].mlp.gate_proj.weight.fill_(1e30)
    tiny_lm.folder(tmp_path / "source", model)
    (tmp_path / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    text = Calibration(str(tmp_path / "text.txt"), nsamples=2, seqlen=48, fisher=False)
    options: dict[str, Any] = {"format": "int4", "method": "ldlq", "calibration": text}
    report = bitfold.quantize(tmp_path / "source", tmp_path / "out", **options)
    assert any("layers.0.mlp.down_proj" in fallback["where"] for fallback in report.fallbacks)
    assert all("Traceback" in fallback["exception"] for fallback in report.fallbacks)
    flagged = {t.tensor for t in report.flagged if any("without data" in flag for flag in t.flags)}
    assert "model.layers.0.mlp.down_proj.weight" in flagged
    assert "model.layers.0.self_attn.q_proj.weight" not in flagged
    with pytest.raises(BitfoldError, match="not finite"):
        bitfold.quantize(tmp_path / "source", tmp_path / "strict", **options, strict=True)
