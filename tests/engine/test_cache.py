"""Keys and values: how they are rounded, how much of them is kept, and on disk."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_lm
from bitfold.engine import Sampling, Writer
from bitfold.engine import decoder as decoders
from bitfold.engine.decoder import CACHES, Decoder
from bitfold.errors import CheckpointError, UsageError
from bitfold.system import native, progress
from small_decoders import build, ids_of

pytestmark = pytest.mark.skipif(native.core() is None, reason="no native core")


def rounded(x: Tensor, cache: str) -> Tensor:
    """As the engine keeps numbers of a head (..., dim), in double precision but for the scale."""
    if cache in ("bf16", "f16"):
        return x.to(torch.bfloat16 if cache == "bf16" else torch.float16).float()
    most = 127 if cache == "int8" else 7
    turn = torch.ones(1, 1, dtype=torch.float64)
    while len(turn) < x.shape[-1]:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    turn = turn / turn[0].norm()
    y = x.double() @ turn
    scale = (y.abs().amax(-1, keepdim=True) / most).bfloat16().double()
    return ((y / scale).round().clamp(-most, most) * scale @ turn).float()


class Rounded(hf.DynamicCache):
    """Of transformers, with keys and values rounded as the engine rounds them."""

    def __init__(self, cache: str) -> None:
        super().__init__()
        self.rounding = cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(rounded(key, self.rounding), rounded(value, self.rounding), *args, **kwargs)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_LEAST_FOR_INT4", 0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("cache", CACHES[1:])
def test_what_is_kept_is_what_transformers_would_see(name, cache, any_size):
    """Nearly a tie in rounding, a number may become its neighbour: most tokens agree to what float32 gives."""
    model, ids = build(name), ids_of(150)
    decoder = Decoder(model, 256, 2, cache=cache)
    found = torch.cat([decoder.logits(ids[:100]), *(decoder.extend([i])[None] for i in ids[100:])])
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), past_key_values=Rounded(cache)).logits[0]
    off = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(off[:3].max()) < 1e-3
    assert float(off.median()) < {"f16": 1e-3, "bf16": 1e-3, "int8": 3e-3, "int4": 0.05}[cache]


def test_memory_is_what_was_announced():
    """Of each head and position dim numbers for keys and as many for values, and two scales."""
    model = build("llama")  # 3 layers, 2 heads of 32
    rows = 3 * 2 * 256 * 5
    assert Decoder(model, 250, sequences=5, cache="bf16").cache_bytes == rows * 2 * 32 * 2
    assert Decoder(model, 250, sequences=5, cache="int8").cache_bytes == rows * 2 * (32 + 2)


_GROWN = """
import re, torch
from bitfold.engine.decoder import Decoder
from bitfold.engine.shapes import random_model

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

model = random_model("smollm-135m", "int4-g64", "int8")
first = Decoder(model, 8, 2)
first.extend([1, 2, 3])  # threads are there, libraries loaded
del first
before = resident()
decoder = Decoder(model, 2048, 2, cache="int8")
decoder.extend(list(range(2048)))
print(resident() - before, decoder.cache_bytes + decoder.working_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process holds")
def test_a_process_grows_by_no_more_than_was_announced():
    """And by most of it: the announcement is no guess far above."""
    done = subprocess.run([sys.executable, "-c", _GROWN], capture_output=True, text=True, check=True)
    grown, announced = map(int, done.stdout.split())
    assert announced / 2 < grown <= announced


def test_long_texts_are_kept_in_8_bits_where_that_costs_little():
    assert Decoder(build("llama"), 4096).cache == "f16"
    assert Decoder(build("phi4"), 4097).cache == "int8"
    assert Decoder(build("qwen2"), 4097).cache == "f16"  # keys with a bias


def test_windows_keep_only_their_window():
    model = build("gemma3")  # windows of 32 in two layers of three
    short, long = (Decoder(model, positions, cache="int8").cache_bytes for positions in (4096, 8192))
    assert long - short == 2 * 4096 * 2 * (32 + 2)  # one layer grew


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_windows_go_round(name):
    """Far beyond the window, prompts in chunks and single tokens: as a cache that keeps everything."""
    model = build(name)
    model.config.max_position_embeddings = 2048
    ids = ids_of(900)
    decoder = Decoder(model, 1024, 2, cache="bf16")
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), past_key_values=Rounded("bf16")).logits[0]
    found = torch.cat([decoder.logits(ids[:700]), decoder.logits(ids[700:703]), decoder.step([(0, ids[703:])])])
    for rows, want in ((found[:-1], wanted[:703]), (found[-1:], wanted[-1:])):
        assert float(((rows - want).norm(dim=1) / want.norm(dim=1)).quantile(0.75)) < 1e-3


def test_what_windows_forgot_is_read_again():
    model, ids = build("gemma3"), ids_of(900)
    decoder = Decoder(model, 1024, 2, sequences=2)
    decoder.extend(ids)
    decoder.copy(0, 1, 100)
    assert decoder.texts[1] == []
    assert decoder.keep([*ids[:850], 5, 6]) == 850
    assert decoder.keep([*ids[:100], 5]) == 0
    again, once = decoder.extend([*ids[:100], 5]), Decoder(model, 1024, 2).extend([*ids[:100], 5])
    assert float((again - once).norm() / once.norm()) < 1e-5
    decoder.extend(ids[:800], 1)
    del decoder.texts[1][50:]
    with pytest.raises(UsageError, match="sliding windows"):
        decoder.extend([5], 1)


def test_four_bits_are_refused_for_small_models(any_size, monkeypatch):
    with pytest.raises(UsageError, match="not of 16"):
        Decoder(build("qwen2"), 64, cache="int4")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="million weights too much"):
        Decoder(build("llama"), 64, cache="int4")
    with pytest.raises(UsageError, match="unknown cache"):
        Decoder(build("llama"), 64, cache="fp8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_lm.folder(tmp_path / "model", tiny_lm.model())


PROMPT = "Once upon a time there was a fox who lived in a forest"


def read_in(folder: Path, file: Path, prompt: str = PROMPT, **settings: Any) -> tuple[str, list[int]]:
    """The text, and how many tokens were read in each pass."""
    writer = Writer.open(folder, dtype="float32")
    writer.prompt_cache, writer.guesses = file, 0
    for name, value in settings.items():
        setattr(writer, name, value)
    writer._loop = None
    read: list[int] = []
    run = Decoder.best

    def best(self: Decoder, work: Any, top: int = 1) -> Any:
        read.append(len(work[0][1]))
        return run(self, work, top)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "best", best)
        return writer.write(prompt, Sampling(5)).text, read


def test_a_prompt_on_disk_is_not_read_again(folder, tmp_path):
    file = tmp_path / "prompt.cache"
    text, read = read_in(folder, file)
    assert read[0] > 5
    again, reread = read_in(folder, file)
    assert (again, reread[0]) == (text, 1)
    assert read_in(folder, file, PROMPT + " and")[1][0] < read[0]
    assert [f.name for f in tmp_path.iterdir() if "prompt" in f.name] == ["prompt.cache"]


def test_a_file_that_does_not_fit_is_not_used_and_one_line_says_so(folder, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    file = tmp_path / "prompt.cache"
    text, read = read_in(folder, file)
    good = load_file(file)
    other = tmp_path / "other"
    tiny_lm.folder(other, tiny_lm.model(seed=1))
    for spoil in (
        lambda: read_in(other, file),  # written anew by another model
        lambda: file.write_bytes(b"no cache"),
        lambda: save_file({"tokens": good["tokens"], "cache": good["cache"][:-1]}, file),
        lambda: read_in(folder, file, cache="bf16"),
    ):
        spoil()
        said.clear()
        assert read_in(folder, file) == (text, read)
        assert len(said) == 1
        assert "is not used" in said[0]
        assert read_in(folder, file)[1][0] == 1
    with pytest.raises((UsageError, CheckpointError)):
        read_in(folder, tmp_path / "nowhere" / "prompt.cache")


def test_loss_of_a_rounded_cache(any_size):
    """8 bits cost next to nothing, 4 bits more: mean KL on a random model with sharp attention."""
    model, ids = build("llama"), ids_of(200)
    log_p = {c: Decoder(model, 256, cache=c).logits(ids).log_softmax(-1) for c in CACHES[1:]}
    kl = {c: float((log_p["f16"].exp() * (log_p["f16"] - log_p[c])).sum(-1).mean()) for c in ("bf16", "int8", "int4")}
    assert kl["int8"] < kl["int4"] / 10
    assert kl["bf16"] < kl["int4"] / 10
    assert math.isfinite(kl["int4"])
