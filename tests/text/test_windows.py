"""Windows begin as the tokenizer begins a text, and every token of the text is predicted at most once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from torch import nn

import tiny_lm
from bitfold.calibration import calibration_tokens
from bitfold.errors import UsageError
from bitfold.evaluation import evaluate
from bitfold.evaluation.layers import layer_errors
from bitfold.evaluation.outliers import find_outliers
from bitfold.run.driver import quantize
from bitfold.text import tokens
from bitfold.text import windows as texts
from bitfold.text.start import start_name, text_start

CONTEXT = 32
STARTS: dict[str, tuple[str, ...]] = {
    "$A": (),
    "<s> $A": ("<s>",),
    "<s> $A <end>": ("<s>",),
    "[gMASK] <sop> $A": ("[gMASK]", "<sop>"),
    "$A <end>": (),
}


def tokenizer(single: str) -> hf.PreTrainedTokenizerFast:
    """Bytes, and special tokens around a text as the template says; a bos_token that is there in any case."""
    raw = tiny_lm.tokenizer().backend_tokenizer
    raw.add_special_tokens(["<s>", "[gMASK]", "<sop>"])
    names = [name for name in single.split() if name != "$A"]
    if names:
        pairs = [(name, raw.token_to_id(name)) for name in names]
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<end>", pad_token="<end>")


def model(seed: int = 0) -> nn.Module:
    """With an embedding of all 260 tokens."""
    config = tiny_lm.model().config
    config.vocab_size = 260
    torch.manual_seed(seed)
    made: nn.Module = hf.LlamaForCausalLM(config).eval()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer begins a text with two tokens."""
    path = tmp_path_factory.mktemp("start")
    model().save_pretrained(path)  # type: ignore[operator]
    tokenizer("[gMASK] <sop> $A").save_pretrained(path)
    return path


@pytest.mark.parametrize("single", STARTS)
def test_what_the_tokenizer_does_counts(single: str) -> None:
    """And not which tokens it names; what it puts behind a text is not for a window."""
    made = tokenizer(single)
    start = text_start(made)
    assert tuple(made.convert_ids_to_tokens(list(start))) == STARTS[single]
    assert start_name(start, made) == ("".join(STARTS[single]) or None)
    assert text_start(made, wanted=False) == ()


class Stubborn:
    """A tokenizer that puts its start whatever it is told."""

    all_special_ids = (1, 2)

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *(10 + ord(c) for c in text)]}


def test_a_start_is_not_put_twice() -> None:
    """By a tokenizer that always puts it, or by a text that brings it along, as chat templates do."""
    assert text_start(Stubborn()) == (1,)
    assert texts.tokenize("ab", Stubborn()).tolist() == [107, 108]
    made = tokenizer("<s> $A")
    assert torch.equal(texts.tokenize("<s>word", made), texts.tokenize("word", made))


@given(st.integers(2, 12), st.integers(1, 12), st.integers(2, 60), st.integers(0, 3))
def test_every_token_but_the_first_of_a_window_counts_once(context: int, stride: int, length: int, start: int) -> None:
    """With a start token that first one, too."""
    own = context - start
    if stride > own or length < own or own < 1:
        return
    windows = texts.cut(torch.arange(length), context, stride, None, tuple(range(-start, 0)))
    assert windows.ids[:, :start].tolist() == [list(range(-start, 0))] * len(windows)
    counted = [
        int(windows.ids[w, i + 1]) for w in range(len(windows)) for i in range(windows.first(w), windows.context - 1)
    ]
    assert len(counted) == len(set(counted)) == windows.total
    covered = (len(windows) - 1) * stride + own
    unpredictable = [] if start else range(0, covered, context) if stride == context else [0]
    assert sorted(counted) == [t for t in range(covered) if t not in unpredictable]


def test_sizes_that_do_not_fit() -> None:
    """A window needs room for a token beside its start; the text need not be as long as the window."""
    with pytest.raises(UsageError, match="at least 3 tokens, not 2"):
        texts.cut(torch.arange(9), 2, None, None, (1, 2))
    with pytest.raises(UsageError, match="has 9 tokens, fewer than one window of 12"):
        texts.cut(torch.arange(9), 12, None, None, (1, 2))
    assert texts.cut(torch.arange(9), 11, 11, None, (1, 2)).ids.shape == (1, 11)
    assert texts.cut(torch.arange(9), 4, None, None, (1, 2)).head(6).ids.tolist() == [[1, 2, 0, 1]]
    assert texts.cut(torch.arange(9), 4, None, None, (1, 2)).head(3).ids.shape == (1, 4)


@pytest.mark.parametrize("start_token", [True, False])
def test_perplexity_by_definition(folder: Path, start_token: bool) -> None:
    """Windows by hand: the start is given, the token behind it predicted from it."""
    made, net = tokenizer("[gMASK] <sop> $A"), model()
    start = made.convert_tokens_to_ids(["[gMASK]", "<sop>"]) if start_token else []
    ids = made(tiny_lm.TEXT, add_special_tokens=False)["input_ids"]
    own, losses = CONTEXT - len(start), []
    for w in range(4):
        window = torch.tensor([*start, *ids[w * own : (w + 1) * own]])
        with torch.no_grad():
            logits = net(input_ids=window[None]).logits[0].double()
        losses += nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")[max(0, len(start) - 1) :]
    options: dict[str, Any] = {"context": CONTEXT, "start_token": start_token}
    found = evaluate(folder, None, tiny_lm.TEXT, max_tokens=4 * own + 1 + len(start), **options)
    assert (found.windows, found.tokens) == (4, len(losses))
    assert found.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found.start_token == ("[gMASK]<sop>" if start_token else None)


def test_everything_that_reads_a_text_begins_with_it(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Calibration, the model's own text, layer errors and outliers; and none of them when it is not wanted."""
    (tmp_path / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    (tmp_path / "two.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n', encoding="utf-8")
    start = text_start(tokenizer("[gMASK] <sop> $A"))
    for name in ("text.txt", "two.jsonl"):
        ids = calibration_tokens(folder, str(tmp_path / name), nsamples=3, seqlen=9)
        assert ids[:, :2].tolist() == [list(start)] * len(ids)
        assert not set(start) & set(ids[:, 2:].flatten().tolist())
        bare = calibration_tokens(folder, str(tmp_path / name), nsamples=3, seqlen=9, start_token=False)
        assert not set(start) & set(bare.flatten().tolist())
        assert torch.equal(ids[:, 2:].flatten()[:9], bare.flatten()[:9])
    own = tokens.own_text(model(), nsamples=2, seqlen=12, seed=0, start=start)
    assert own.shape == (2, 12)
    assert own[:, :2].tolist() == [list(start)] * 2
    quantize(folder, tmp_path / "out", format="int4")
    windows: list[torch.Tensor] = []
    cut = texts.cut
    monkeypatch.setattr(texts, "cut", lambda *a: (windows.append((w := cut(*a)).ids), w)[1])
    for wanted in (True, False):
        layer_errors(tmp_path / "out", folder, tiny_lm.TEXT, max_tokens=64, context=32, start_token=wanted)
        find_outliers(folder, tiny_lm.TEXT, max_tokens=64, context=32, start_token=wanted)
        assert [tuple(ids[-1, :2].tolist()) == start for ids in windows] == [wanted] * 2
        windows.clear()


def test_tokenizers_that_begin_differently_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """A quantized folder that lost the start token is not compared with an original that has it, but without both."""
    model(1).save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer("$A").save_pretrained(tmp_path)
    options: dict[str, Any] = {"context": CONTEXT, "max_tokens": 2 * CONTEXT}
    with pytest.raises(UsageError, match=r"begins a text with nothing, the reference's with \[gMASK\]<sop>"):
        evaluate(tmp_path, folder, tiny_lm.TEXT, **options)
    assert evaluate(tmp_path, folder, tiny_lm.TEXT, **options, start_token=False).kl_mean is not None
