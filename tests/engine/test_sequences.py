"""Several sequences in one decoder: each is answered as if it were alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import bitfold
from bitfold.engine.decoder import Decoder
from bitfold.errors import UsageError
from bitfold.system import native
from small_decoders import build, ids_of

pytestmark = pytest.mark.skipif(native.core() is None, reason="no native core")


def near(found: Tensor, wanted: Tensor) -> bool:
    """Sums in another order, and keys and values that are nearly ties in bfloat16."""
    return float((found - wanted).norm() / wanted.norm()) < 1e-3


def alone(model: nn.Module, ids: list[int]) -> Tensor:
    return Decoder(model, 512, 1).extend(ids)


@pytest.fixture(scope="module", params=["llama", "gemma3", "olmo2", "qwen3-moe"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = build(request.param)
    bitfold.quantize_(made, "int4-g32")
    return made


@pytest.mark.parametrize("sequences", [2, 3, 8, 17])
def test_each_is_answered_as_if_alone(model, sequences):
    """Prompts of different lengths at once, more than are read in one go; then token by token, some of them."""
    texts = [ids_of(3 + 23 * i % 101, seed=i) for i in range(sequences)]
    decoder = Decoder(model, 128, 2, sequences)
    found = decoder.step([(i, text) for i, text in enumerate(texts)])
    for i, text in enumerate(texts):
        assert near(found[i], alone(model, text))
    choose = random.Random(0)
    for turn in range(4):
        some = choose.sample(range(sequences), choose.randint(1, sequences))
        new = {i: ids_of(1 + (turn + i) % 3, seed=turn) for i in some}
        found = decoder.step([(i, new[i]) for i in some])
        for row, i in enumerate(some):
            texts[i] = texts[i] + new[i]
            assert near(found[row], alone(model, texts[i]))
    assert decoder.texts == texts


def test_none_sees_another(model):
    """With other texts beside it, of the same lengths, a sequence is answered with the same bits.

    But for mixtures: how many tokens go through an expert together decides in which order it sums.
    """
    first, found = ids_of(40), []
    for seed in (1, 2):
        decoder = Decoder(model, 64, 2, 3)
        decoder.step([(0, ids_of(40, seed=seed)), (1, first), (2, ids_of(20, seed=seed))])
        found.append(decoder.step([(2, [5 + seed]), (1, [7]), (0, [9 + seed])])[1])
    same = near if hasattr(model.config, "num_experts") else torch.equal
    assert same(found[0], found[1])


def test_threads_give_the_same_bits(model):
    work = [(i, ids_of(30 + i, seed=i)) for i in range(5)]
    found = [Decoder(model, 64, threads, 5).step(work) for threads in (1, 3)]
    assert torch.equal(found[0], found[1])


def test_long_texts_beside_short_ones():
    """Their cache is looked at in pieces, one token's or some."""
    model = build("llama")
    model.config.max_position_embeddings = 2048
    ids = ids_of(1300)
    decoder = Decoder(model, 2048, 2, 3)
    decoder.step([(0, ids[:-3]), (2, ids[:7])])
    found = decoder.step([(2, ids[7:9]), (0, ids[-3:])])
    assert near(found[0], Decoder(model, 2048, 1).extend(ids[:9]))
    assert near(found[1], Decoder(model, 2048, 1).extend(ids))


def test_what_begins_alike_is_copied(model):
    ids = ids_of(60)
    decoder = Decoder(model, 64, 2, 2)
    wanted = decoder.extend(ids)
    decoder.extend(ids_of(50, seed=3), 1)
    decoder.copy(0, 1, 37)
    assert decoder.texts[1] == ids[:37]
    assert near(decoder.extend(ids[37:], 1), wanted)
    assert decoder.keep([*ids[:20], 1, 2], 1) == 20
    assert decoder.ids == ids


@pytest.mark.parametrize("sequences", [1, 3, 9])
@pytest.mark.parametrize("top", [1, 5, 300])
def test_the_best_are_found_by_the_threads(model, sequences, top):
    work = [(i, ids_of(9 + i, seed=i)) for i in range(sequences)]
    logits = Decoder(model, 64, 3, sequences).step(work)
    values, tokens = Decoder(model, 64, 3, sequences).best(work, top)
    assert torch.equal(values, logits.topk(top).values)
    assert torch.equal(values, logits.gather(1, tokens))
    assert all(len(set(row)) == top for row in tokens.tolist())


def test_of_equal_logits_the_first_is_the_best():
    model = build("qwen2")
    nn.init.zeros_(model.lm_head.weight)
    assert Decoder(model, 64, 3).best([(0, [5])], 4)[1].tolist() == [[0, 1, 2, 3]]


def test_what_cannot_be_done_is_said(model):
    with pytest.raises(UsageError, match="at least one sequence"):
        Decoder(model, 64, sequences=0)
    decoder = Decoder(model, 64, sequences=2)
    for work, words in (
        ([], "no tokens"),
        ([(0, [1]), (1, [])], "no tokens"),
        ([(0, [1]), (0, [2])], "named only once"),
        ([(2, [1])], "no sequence 2"),
        ([(1, ids_of(65))], "65 tokens are more than"),
    ):
        with pytest.raises(UsageError, match=words):
            decoder.step(work)
    for top in (0, 301):
        with pytest.raises(UsageError, match="of 300 tokens"):
            decoder.best([(0, [1])], top)
    for source, target, tokens in ((0, 0, 0), (0, 1, 1)):
        with pytest.raises(UsageError, match="cannot copy"):
            decoder.copy(source, target, tokens)
    assert decoder.texts == [[], []]
