"""The native engine against transformers: every family, every format, every instruction set of the machine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import bitfold
from bitfold.engine.decoder import Decoder, Unsupported
from bitfold.engine.families import FAMILIES
from bitfold.errors import UsageError
from bitfold.system import native
from small_decoders import CONFIGS, build, ids_of

pytestmark = pytest.mark.skipif(native.core() is None, reason="no native core")

FORMATS = ("int8", "int4-asym-g32", "int3", "nf4", "trellis-2", "trellis-4", "fp4")


class Rounded(hf.DynamicCache):
    """Keys and values as the engine keeps them, in bfloat16."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(key.bfloat16().float(), value.bfloat16().float(), *args, **kwargs)


def wanted(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), past_key_values=Rounded()).logits[0].float()


def found(model: nn.Module, ids: list[int], threads: int, prompt: int = 100) -> Tensor:
    """Logits behind each token: a prompt at once, the rest one by one."""
    decoder = Decoder(model, 256, threads, cache="bf16")
    rows = [decoder.logits(ids[:prompt]), *(decoder.extend([i])[None] for i in ids[prompt:])]
    return torch.cat(rows)


def check(model: nn.Module, threads: int = 1) -> None:
    """Both compute in float32, in another order, and round keys and values to 8 bits of mantissa: near ties differ, and
    a token between two experts may go to the other.

    A mistake (a norm, a position, a window by one) shows in the first digit of most tokens.
    """
    ids = ids_of()
    want, got = wanted(model, ids), found(model, ids, threads)
    off = (got - want).norm(dim=1) / want.norm(dim=1)
    for part in (off[:100], off[100:]):
        assert float(part.quantile(0.75)) < 1e-3


def test_every_family_is_tried():
    classes = {type(build(name)).__name__ for name in CONFIGS}
    assert set(FAMILIES) <= classes


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_weights(name):
    check(build(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized(name):
    model = build(name)
    bitfold.quantize_(model, "int8")
    check(model, threads=2)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(name, format):
    model = build(name)
    bitfold.quantize_(model, format)
    check(model)


@pytest.fixture(params=native.core().isas() if native.core() else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    core = native.core()
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


@pytest.mark.parametrize("format", ["int4-asym-g32", "trellis-3"])
def test_every_instruction_set(isa, format):
    model = build("gemma3")
    bitfold.quantize_(model, format)
    check(model, threads=2)


def test_embedding_and_head_in_few_bits():
    for name in ("llama-scaled", "qwen2", "mixtral"):
        model = build(name)
        recipe = bitfold.Recipe((bitfold.Rule("re:.*(embed_tokens|lm_head).*", "int8"), bitfold.Rule("*", "int4-g32")))
        bitfold.quantize_(model, recipe)
        check(model)


def test_rotations_and_rounded_activations():
    """Rounded to 8 bits, a difference in the last place of float32 may be one of a whole step: the logits are near."""
    for name in ("llama", "qwen2-moe"):
        model = build(name)
        bitfold.quantize_(model, bitfold.Recipe.of("int4-g32", transform="hadamard"))
        check(model)
    model = build("llama")
    bitfold.quantize_(model, bitfold.Recipe.of("int8", transform="hadamard", act="int8"))
    want, got = wanted(model, ids_of()), found(model, ids_of(), 2)
    assert float((got - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["qwen3", "qwen2-moe"])
def test_threads_give_the_same_bits(name, threads):
    """Rows are shared out, and nothing is added across threads but pieces of a long text's attention."""
    model = build(name)
    bitfold.quantize_(model, "int4-g32")
    ids = ids_of()
    assert torch.equal(found(model, ids, threads), found(model, ids, 1))


def test_a_long_text_is_seen_in_pieces():
    model, ids = build("llama"), ids_of(1400)
    model.config.max_position_embeddings = 2048
    decoder = Decoder(model, 2048, 2, cache="bf16")
    decoder.extend(ids[:-1])
    got, want = decoder.extend(ids[-1:]), wanted(model, ids)[-1]
    assert float((got - want).norm() / want.norm()) < 1e-3


def test_what_begins_alike_is_kept():
    model, ids = build("llama"), ids_of()
    decoder = Decoder(model, 256)
    whole = decoder.extend(ids)
    assert decoder.keep([*ids[:90], 7, 8]) == 90
    other = decoder.extend([7, 8])
    assert not torch.equal(other, whole)
    assert decoder.keep(ids) == 90
    again = decoder.extend(ids[90:])
    assert float((again - whole).norm() / whole.norm()) < 1e-5


def test_what_cannot_be_done_is_said():
    model = build("llama")
    decoder = Decoder(model, 64)
    with pytest.raises(UsageError, match="no tokens"):
        decoder.extend([])
    with pytest.raises(UsageError, match="65 tokens are more than"):
        decoder.extend(ids_of(65))
    with pytest.raises((IndexError, ValueError)):
        decoder.extend([300])
    with pytest.raises(Unsupported, match="not among its families"):
        Decoder(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=2)), 64)
    other = copy.deepcopy(model)
    bitfold.quantize_(other, "fp8-e4m3")
    with pytest.raises(Unsupported, match="no loops for fp8-e4m3"):
        Decoder(other, 64)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(Unsupported, match="hooks"):
        Decoder(model, 64)
