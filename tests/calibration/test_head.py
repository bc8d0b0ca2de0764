"""The output head under error feedback, tied to the embedding or not: solved last, under what really enters it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.calibration import BlockWalk, Text, head, walk_shape
from bitfold.checkpoints import open_source
from bitfold.planning import row_slices
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.workspace.folder import partial_of

FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {"sliding_window": 8},
    "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 32, "n_head": 2},
}
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "head_dim": 16}
NAMES = {True: "model.embed_tokens.weight", False: "lm_head.weight"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_enters_the_head_is_what_the_model_sends_there(family: str, tied: bool) -> None:
    """Unquantized, norm and all; and the head itself is never read."""
    cls: Any = getattr(transformers, family)
    sizes = {} if family.startswith("GPT2") else SIZES
    torch.manual_seed(0)
    model = cls(cls.config_class(vocab_size=64, tie_word_embeddings=tied, **sizes, **FAMILIES[family])).eval()
    ids, sent = torch.arange(24).view(2, 12), list[torch.Tensor]()
    handle = model.lm_head.register_forward_pre_hook(lambda _module, inputs: sent.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    class Whole(dict[str, torch.Tensor]):
        read_rows = None

        def read(self, name: str) -> torch.Tensor:
            assert name != "lm_head.weight"
            return self[name].detach().clone()

    walk = BlockWalk(copy.deepcopy(model), Whole(state), walk_shape(model).chains[0], Text(ids))
    walk.start()
    for index in range(len(walk)):
        list(walk.block(index, []))
    found = torch.cat(list(walk.ends("lm_head")))
    assert torch.allclose(found, sent[0], atol=1e-4)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a text."""
    config = tiny_lm.model().config
    config.tie_word_embeddings = request.param
    torch.manual_seed(0)
    folder = tiny_lm.folder(tmp_path_factory.mktemp("head") / "source", transformers.LlamaForCausalLM(config).eval())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


def tied(source: Path) -> bool:
    return bool(transformers.AutoConfig.from_pretrained(source).tie_word_embeddings)


def made(source: Path, out: Path, method: str, **more: Any) -> bitfold.QuantizeReport:
    """Blocks of 4 bits, and the head by the method."""
    name = NAMES[tied(source)]
    rules = Recipe((Rule(name, "int3-asym-g32", method, transform="none"), Rule("*_proj.weight", "int4-g32", "ldlq")))
    text = Calibration(str(source / "text.txt"), nsamples=6, seqlen=48, fisher=False, drift=0.0)
    return bitfold.quantize(source, out, recipe=rules, calibration=text, **more)


def kl(folder: Path, source: Path) -> float:
    found = bitfold.evaluate(str(folder), str(source), tiny_lm.TEXT[:3000], context=64, max_tokens=1024).kl_mean
    assert found is not None
    return found


@torch.no_grad()
def head_kl(folder: Path, source: Path) -> float:
    """KL that the head alone is to blame for: on what the original sends there."""
    model, name = transformers.AutoModelForCausalLM.from_pretrained(source), NAMES[tied(source)]
    quantized = open_source(folder)
    ids = tiny_lm.tokenizer()(tiny_lm.TEXT[:1000], return_tensors="pt")["input_ids"][:, : tiny_lm.POSITIONS]
    hidden = model.model(ids).last_hidden_state[0]
    was, now = ((hidden @ w.float().T).log_softmax(-1) for w in (model.lm_head.weight, quantized.read(name)))
    quantized.close()
    return float((was.exp() * (was - now)).sum(-1).mean())


def content(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_it_loses_less_than_rounding(source: Path, tmp_path: Path) -> None:
    losses = {}
    for method in ("rtn", "ldlq:0.1", "gptq"):
        report = made(source, tmp_path / method, method)
        losses[method] = head_kl(tmp_path / method, source)
        (found,) = (t for t in report.tensors if t.tensor == NAMES[tied(source)])
        assert (found.output_error is None) == (method == "rtn")
        assert not found.flags
    assert max(losses["ldlq:0.1"], losses["gptq"]) < 0.8 * losses["rtn"], losses


def test_rows_do_not_know_each_other(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, the same codes; sums of floats may be another by their last bits, so not in every scale."""
    whole = made(source, tmp_path / "whole", "ldlq")
    monkeypatch.setattr(row_slices, "WEIGHTS", 64 * 64)
    pieces = made(source, tmp_path / "pieces", "ldlq")
    assert kl(tmp_path / "pieces", source) == pytest.approx(kl(tmp_path / "whole", source), rel=0.02)
    for a, b in zip(whole.tensors, pieces.tensors, strict=True):
        assert (a.output_error or 0) == pytest.approx(b.output_error or 0, rel=0.02)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", ["the blocks", "the head"])
def test_a_run_goes_on_behind_the_blocks(source: Path, tmp_path: Path, after: str) -> None:
    """From the activations that were kept for it; no block is done again."""
    expected, name, seen = made(source, tmp_path / "whole", "ldlq"), NAMES[tied(source)], list[str]()

    def stop(report: Any) -> None:
        seen.append(report.tensor)
        if report.tensor == name if after == "the head" else len(seen) == 14:
            raise Stopped

    with pytest.raises(Stopped), pytest.warns(UserWarning, match="goes on"):
        made(source, tmp_path / "out", "ldlq", on_tensor=stop)
    assert seen[-1] == name if after == "the head" else name not in seen
    again = list[str]()
    report = made(source, tmp_path / "out", "ldlq", on_tensor=lambda t: again.append(t.tensor))
    assert (name in again) == (after == "the blocks")
    assert not any("layers.0" in tensor and "proj" in tensor for tensor in again)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert [t.output_error for t in report.tensors] == [t.output_error for t in expected.tensors]
    assert not partial_of(tmp_path / "out").exists()


def test_a_failure_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> None:
        raise RuntimeError("no head for that")

    monkeypatch.setattr(head, "_statistics", broken)
    report = made(source, tmp_path / "out", "ldlq")
    (fallback,) = report.fallbacks
    assert (fallback["where"], fallback["instead"]) == (NAMES[tied(source)], "quantized without data")
    assert kl(tmp_path / "out", source) > 0


def test_little_text_is_said(source: Path, tmp_path: Path) -> None:
    name = NAMES[tied(source)]
    text = Calibration(str(source / "text.txt"), nsamples=1, seqlen=8, fisher=False, drift=0.0)
    rules = Recipe((Rule(name, "int4-g32", "ldlq", transform="none"),))
    (found,) = bitfold.quantize(source, tmp_path / "out", recipe=rules, calibration=text).quantized
    assert (found.tensor, found.output_error) == (name, None)
    assert "8 tokens reached it" in found.flags[0]
