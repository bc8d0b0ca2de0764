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


def tokens(folder: Path, by_engine: bool, count: int, guesses: int = 0, **settings: Any) -> list[int]:
    """Of our loop, with our sampler; of transformers' own, with its own processors."""
    writer = Writer.open(folder, dtype="float32")
    writer.guesses = guesses
    ids = torch.tensor([writer.tokenizer(PROMPT)["input_ids"]])
    writer.model.generation_config.update(**settings)  # type: ignore[union-attr, operator]
    if by_engine:
        made: list[int] = []
        writer._generate(
            ids, writer._config(writer.model, count), writer._sampler(ids, Sampling()), lambda t: bool(made.append(t))
        )
        assert writer.native  # nothing fell back
        return made
    out = writer.model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return list(out[0, ids.shape[1] :].tolist())


def check_same(folder: Path, count: int = 40, **settings: Any) -> list[int]:
    """The same tokens, or at the first difference two that are equally likely but for rounding of keys and values."""
    ours, theirs = (tokens(folder, by_engine, count, **settings) for by_engine in (True, False))
    check_alike(folder, ours, theirs)
    return ours


def check_alike(folder: Path, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    at = next(i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    writer = Writer.open(folder, dtype="float32")
    ids = [*writer.tokenizer(PROMPT)["input_ids"], *ours[:at]]
    with torch.no_grad():
        logits = writer.model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert abs(float(logits[ours[at]] - logits[theirs[at]])) < 0.01 * float(logits.std())


def test_greedy_text(folder):
    assert len(check_same(folder)) == 40


def test_settings_of_the_model(folder):
    assert check_same(folder, repetition_penalty=1.7) != check_same(folder)


def test_end_tokens_end_it(folder):
    made = check_same(folder)
    end = made[5]
    first = made.index(end)
    assert check_same(folder, eos_token_id=[end, 256]) == made[: first + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guesses", [1, 4, 15])
def test_guesses_change_no_text(folder, guesses, temperature):
    """A text of three letters repeats itself all the time, and goes on otherwise as often: guesses right and wrong."""
    writer = Writer.open(folder, dtype="float32")
    guessed = 0
    for seed in range(4):
        asked = Sampling(80, temperature=temperature, seed=seed, logit_bias={64: 1000.0, 65: 1000.0, 66: 999.0})
        writer.guesses, writer._loop = 0, None
        plain = writer.write("abcab" * (seed + 1), asked).text
        writer.guesses, writer._loop = guesses, None
        writer.write("a", Sampling(1))
        assert writer._loop is not None
        decoder = writer._loop._decoder  # type: ignore[attr-defined]
        read: list[int] = []
        logits = decoder.logits
        decoder.logits = lambda ids, read=read, logits=logits: (read.append(len(ids)), logits(ids))[1]
        made = writer.write("abcab" * (seed + 1), asked)
        assert made.text == plain
        assert len(decoder.texts[0]) == made.prompt_tokens + 79  # nothing of a wrong guess is left
        guessed += sum(read) - len(read)
    assert guessed > 40


def test_guesses_that_are_right_save_passes(folder):
    writer = Writer.open(folder, dtype="float32", chat=True)
    writer.guesses = 4
    writer.write(PROMPT, Sampling(1))
    assert writer._loop is not None
    passes, logits = [], writer._loop._decoder.logits
    writer._loop._decoder.logits = lambda ids: (passes.append(len(ids)), logits(ids))[1]  # type: ignore[method-assign]
    made = writer.write("abcabcabcabc", Sampling(60, logit_bias=dict.fromkeys((64, 65, 66), 1000.0)))
    assert made.tokens == 60
    assert passes
    assert max(passes) == 5
    assert len(writer._loop._decoder.ids) == made.prompt_tokens + 59  # nothing of a wrong guess is left


@pytest.mark.parametrize("guesses", [0, 3])
def test_draws_with_guesses_have_the_distribution(folder, guesses):
    """Two tokens behind a prompt, 1500 times: pairs as often as the model says. Chi-square, chance in 10^6.

    Where the first token is an a, the second is read as a guess (b, as before); the third makes room for it.
    """
    writer = Writer.open(folder, dtype="float32")
    writer.guesses = guesses
    prompt = "abcdabcd"
    ids = writer.tokenizer(prompt)["input_ids"]
    few = writer.tokenizer("abcx")["input_ids"]
    bias = dict.fromkeys(few, 1000.0)
    with torch.no_grad():
        first = writer.model(input_ids=torch.tensor([ids])).logits[0, -1]
        second = torch.stack([writer.model(input_ids=torch.tensor([[*ids, t]])).logits[0, -1] for t in few])
    p = (first[few].softmax(0)[:, None] * second[:, few].softmax(1)).flatten().double()
    found, draws = torch.zeros(16, dtype=torch.float64), 1500
    for seed in range(draws):
        text = writer.write(prompt, Sampling(3, temperature=1.0, seed=seed, logit_bias=bias)).text
        found[4 * "abcx".index(text[0]) + "abcx".index(text[1])] += 1
    expected = p * draws
    statistic = float(((found - expected).square() / expected).sum())
    assert statistic < 60  # 15 degrees of freedom


def test_stop_texts_end_it(folder):
    writer = Writer.open(folder, dtype="float32")
    whole = writer.write(PROMPT, Sampling(40))
    assert whole.finish == "length"
    stop = whole.text[10:13]
    shown: list[str] = []
    made = writer.write(PROMPT, Sampling(40, stop=(stop, "never there")), shown.append)
    assert made.finish == "stop"
    assert made.text == "".join(shown) == whole.text[: whole.text.index(stop)]
    assert made.tokens < whole.tokens
    writer.model.generation_config.update(stop_strings=[stop])  # type: ignore[union-attr, operator]
    assert writer.write(PROMPT, Sampling(40)).text == made.text


@pytest.mark.parametrize("native", [True, False])
def test_both_loops_choose_alike(folder, native):
    """One sampler: with the same seed the text is the same, whoever drives the model."""
    settings = Sampling(20, temperature=0.8, top_k=20, presence_penalty=0.3, logit_bias={70: 1.0}, seed=4)
    writer = Writer.open(folder, dtype="float32")
    expected = writer.write(PROMPT, settings).text
    writer.native = native
    assert writer.write(PROMPT, settings).text[:10] == expected[:10]


def test_ctrl_c_ends_a_text(folder):
    writer = Writer.open(folder, dtype="float32", chat=True)

    def interrupt(text: str) -> None:
        if writer.interruptible or len(shown) == 5:
            shown.append(text)
            raise KeyboardInterrupt
        shown.append(text)

    shown: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        writer.say("Hi", Sampling(40), interrupt)
    assert writer.messages == []
    writer.interruptible = True
    answer = writer.say("Hi", Sampling(40), interrupt)
    assert answer.finish == "interrupted"
    assert answer.tokens >= 1
    assert [m["content"] for m in writer.messages] == ["Hi", answer.text]
    writer.interruptible = False
    assert writer.say("Hi", Sampling(3)).finish in ("length", "end")


def test_a_text_that_goes_on_is_not_read_again(folder):
    writer = Writer.open(folder, dtype="float32")
    writer.write("Once upon a time there was a fox", Sampling(4))
    assert writer._loop is not None
    decoder = writer._loop._decoder
    before = list(decoder.ids)
    read: list[int] = []

    best = decoder.best
    decoder.best = lambda work, top: (read.append(len(work[0][1])), best(work, top))[1]  # type: ignore[method-assign, assignment]
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


@pytest.mark.parametrize("name", ["int4-asym-g64", "int3-affine-g64", "ternary", "nf4-dq", "trellis-2"])
def test_random_weights_whose_rows_end_within_a_byte(name: str, monkeypatch: pytest.MonkeyPatch):
    """What fills up a row's last byte of zero points is zero, and no byte is beyond five codes of three values."""
    small = {"hidden_size": 576, "intermediate_size": 704, "num_hidden_layers": 1, "vocab_size": 300}
    monkeypatch.setitem(SHAPES, "odd", {**SHAPES["smollm-135m"], **small})
    assert measure(random_model("odd", name), threads=[1], prompt=20, tokens=2, turns=1)[0].decode > 0


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
