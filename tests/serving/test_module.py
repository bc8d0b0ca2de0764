"""Models that the engine does not run are served through transformers' forward pass, with or without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import tiny_lm
from bitfold.engine.decoder import Decoder
from bitfold.engine.opening import Opened
from bitfold.errors import UsageError
from bitfold.serving.metrics import Metrics
from bitfold.serving.module import ModuleDecoder
from bitfold.serving.scheduler import Scheduler
from bitfold.serving.server import ServerOptions, _decoder
from bitfold.system import progress
from serving.fakes import Text
from small_decoders import build

SMALL = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}
# Keys and values of all positions; of a window; a state; nothing at all.
CONFIGS = {
    "gpt2": hf.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2),
    "mistral": hf.MistralConfig(
        **SMALL, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8
    ),
    "mamba": hf.MambaConfig(**SMALL, state_size=4),
    "openai-gpt": hf.OpenAIGPTConfig(vocab_size=257, n_positions=512, n_embd=32, n_layer=2, n_head=2),
}


def model(name: str) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


@torch.no_grad()
def by_hand(made: Any, ids: list[int], count: int) -> str:
    """The best token of the whole text, again and again."""
    text = list(ids)
    for _ in range(count):
        text.append(int(made(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return str(tiny_lm.tokenizer().decode(text[len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_those_of_the_model(name):
    """Side by side, going on, with beginnings in common."""
    made = model(name)
    scheduler = Scheduler(ModuleDecoder(made, 500, 2), Metrics(), 10)
    first, long = list(range(5, 25)), [*range(256), *range(60)]
    prompts = [first, [*first[:15], 99], first, [7], [*first, 70, 71, 72], long]
    texts = [Text(prompt, 6) for prompt in prompts]
    try:
        for text in texts[:3]:
            scheduler.submit(text.job)
        for text in texts[:3]:
            text.wait()
        for text in texts[3:]:
            scheduler.submit(text.job)
        for text in texts:
            assert text.wait() == by_hand(made, list(text.ids), 6)
        if name == "gpt2":
            assert texts[4].job.reused >= 20
    finally:
        scheduler.close()


def test_it_says_so(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    made = model("gpt2")
    opened, options = Opened(made, None, None, lambda: made), ServerOptions(sequences=2)
    assert isinstance(_decoder(opened, 50, options)[1], ModuleDecoder)
    assert "GPT2LMHeadModel" in said[0]
    made.generation_config.no_repeat_ngram_size = 3
    _decoder(opened, 50, options)
    assert "no_repeat_ngram_size" in said[1]
    assert "does without" in said[1]


def test_keys_and_values_are_kept_as_asked(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    made = build("llama")
    opened, sizes = Opened(made, None, None, lambda: made), {}
    for cache in ("f16", "int8"):
        _, decoder = _decoder(opened, 64, ServerOptions(sequences=2, cache=cache))
        assert isinstance(decoder, Decoder)
        assert decoder.cache == cache
        sizes[cache] = decoder.cache_bytes
    assert sizes["int8"] < sizes["f16"]
    with pytest.raises(UsageError, match="unknown cache"):
        ServerOptions(cache="fp8")
    other = model("gpt2")
    _decoder(Opened(other, None, None, lambda: other), 50, ServerOptions(cache="int8"))
    assert "the cache is transformers' own" in said[-1]
