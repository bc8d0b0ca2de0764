"""The engine's loop writes what transformers' loop writes, under the same generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import tiny_lm
from bitfold.engine import Sampling, Writer
from bitfold.engine.loop import _choose, _processors
from bitfold.engine.shapes import SHAPES, random_model
from bitfold.engine.speed import measure
from bitfold.errors import UsageError
from bitfold.system import native, progress

pytestmark = pytest.mark.skipif(native.core() is None, reason="no native core")
PROMPT = "Once upon"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_lm.folder(tmp_path / "model", tiny_lm.model())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def tokens(folder: Path, by_engine: bool, count: int, **settings: Any) -> list[int]:
    writer = Writer.open(folder, dtype="float32")
    writer.native = by_engine
    config = writer._config(Sampling(count), count)
    config.update(**settings)

    class Silent:
        put = end = staticmethod(lambda *_: None)

    ids = torch.tensor([writer.tokenizer(PROMPT)["input_ids"]])
    made = writer._generate(ids, config, Silent())  # type: ignore[arg-type]
    assert writer.native == by_engine  # nothing fell back
    return made


def check_same(folder: Path, count: int = 40, **settings: Any) -> list[int]:
    """The same tokens, or at the first difference two that are equally likely but for rounding of keys and values."""
    ours, theirs = (tokens(folder, by_engine, count, **settings) for by_engine in (True, False))
    if ours == theirs:
        return ours
    at = next(i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    writer = Writer.open(folder, dtype="float32")
    ids = [*writer.tokenizer(PROMPT)["input_ids"], *ours[:at]]
    with torch.no_grad():
        logits = writer.model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert abs(float(logits[ours[at]] - logits[theirs[at]])) < 0.01 * float(logits.std())
    return ours


def test_greedy_text(folder):
    assert len(check_same(folder)) == 40


def test_settings_of_the_model(folder):
    assert check_same(folder, repetition_penalty=1.7) != check_same(folder)


def test_end_tokens_end_it(folder):
    made = check_same(folder)
    end = made[5]
    first = made.index(end)
    assert check_same(folder, eos_token_id=[end, 256]) == made[: first + 1]


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.2}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_draws_have_the_distribution(settings):
    """Of 4000 draws each probability is met within 5 standard deviations; what must not be drawn never is."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    config = hf.GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    processors = _processors(config)
    scores = logits[None] / settings.get("temperature", 1.0)
    p = scores.softmax(-1)[0]
    if "top_p" in settings:
        p = p.where(p.cumsum(0) - p < 0.6, torch.tensor(0.0))  # they are sorted
    if "top_k" in settings:
        p = p.where(torch.arange(6) < 3, torch.tensor(0.0))
    if "min_p" in settings:
        p = p.where(p >= 0.2 * p.max(), torch.tensor(0.0))
    p = p / p.sum()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = torch.tensor([_choose(logits, [0], processors, draws=True) for _ in range(4000)])
    found = torch.bincount(drawn, minlength=6) / 4000
    assert bool(((found - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all())


def test_a_text_that_goes_on_is_not_read_again(folder):
    writer = Writer.open(folder, dtype="float32")
    writer.write("Once upon a time there was a fox", Sampling(4))
    assert writer._loop is not None
    decoder = writer._loop._decoder
    before = list(decoder.ids)
    read: list[int] = []
    extend = decoder.extend
    decoder.extend = lambda ids: (read.append(len(ids)), extend(ids))[1]  # type: ignore[method-assign, assignment]
    writer.write("Once upon a time there was a fox", Sampling(4))
    assert read == [1, 1, 1, 1]
    assert decoder.ids == before


def test_what_the_loop_cannot_do_goes_to_transformers_and_says_so(folder, said):
    writer = Writer.open(folder, dtype="float32")
    writer.model.generation_config.update(no_repeat_ngram_size=3)  # type: ignore[union-attr, operator]
    assert writer.write(PROMPT, Sampling(5)).tokens == 5
    assert writer.write(PROMPT, Sampling(5)).tokens == 5
    assert len(said) == 1
    assert "no_repeat_ngram_size" in said[0]


def test_a_family_without_code_goes_to_transformers(said):
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=2)).eval()
    assert Writer(model, tiny_lm.tokenizer()).write(PROMPT, Sampling(3)).tokens == 3
    assert "GPT2LMHeadModel is not among its families" in said[0]


def test_adapters_are_not_overlooked(folder, said):
    """A layer that is more than its weight would be run without the rest: it goes to transformers."""

    class Adapted(nn.Linear):
        pass

    writer = Writer.open(folder, dtype="float32")
    writer.model.model.layers[1].mlp.up_proj.__class__ = Adapted  # type: ignore[union-attr, index]
    assert writer.write(PROMPT, Sampling(3)).tokens == 3
    assert "Adapted" in said[0]


def test_random_weights_in_a_known_shape(monkeypatch):
    with pytest.raises(UsageError, match="unknown shape"):
        random_model("llama-0", "int4")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 64}
    monkeypatch.setitem(SHAPES, "small", {**SHAPES["llama-1b"], **small})
    (speed,) = measure(random_model("small", "trellis-3"), threads=[1], prompt=40, tokens=5, turns=1)
    assert speed.prefill > 0
    assert speed.decode > 0
    linears = 2 * 64 * (32 * 64 + 2 * 8 * 64 + 32 * 64 + 3 * 128)
    assert linears * 3 / 8 + 300 * 64 <= speed.token_bytes <= 1.1 * linears * 3 / 8 + 300 * 70
    assert set(speed.to_dict()) >= {"threads", "prefill", "decode", "first_token", "bandwidth", "share"}
