"""Tokens are drawn from the distribution that was asked for, and its filters are those of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.generation import logits_process as lp

from bitfold.engine import Sampling
from bitfold.engine.sampling import Sampler
from bitfold.errors import BitfoldError, ModelError, UsageError

SEEN = [3, 17, 3, 99, 250]
# A setting of ours, and transformers' class for it.
FILTERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({}, []),
    ({"temperature": 0.4}, [lp.TemperatureLogitsWarper(0.4)]),
    ({"temperature": 3.0}, [lp.TemperatureLogitsWarper(3.0)]),
    ({"top_k": 1}, [lp.TopKLogitsWarper(1)]),
    ({"top_k": 40}, [lp.TopKLogitsWarper(40)]),
    ({"top_k": 100000}, [lp.TopKLogitsWarper(100000)]),
    ({"top_p": 0.9}, [lp.TopPLogitsWarper(0.9)]),
    ({"top_p": 0.01}, [lp.TopPLogitsWarper(0.01)]),
    ({"top_p": 0.999}, [lp.TopPLogitsWarper(0.999)]),
    ({"min_p": 0.05}, [lp.MinPLogitsWarper(0.05)]),
    ({"min_p": 1.0}, [lp.MinPLogitsWarper(1.0)]),
    ({"typical_p": 0.5}, [lp.TypicalLogitsWarper(0.5)]),
    ({"typical_p": 0.95}, [lp.TypicalLogitsWarper(0.95)]),
    ({"repetition_penalty": 1.3}, [lp.RepetitionPenaltyLogitsProcessor(1.3)]),
    ({"repetition_penalty": 0.7}, [lp.RepetitionPenaltyLogitsProcessor(0.7)]),
    (
        {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
        [
            *(lp.RepetitionPenaltyLogitsProcessor(1.2), lp.TemperatureLogitsWarper(0.7), lp.TopKLogitsWarper(50)),
            *(lp.TopPLogitsWarper(0.95), lp.MinPLogitsWarper(0.01)),
        ],
    ),
]


def sampler(prompt: list[int] = SEEN, **settings: Any) -> Sampler:
    return Sampler(Sampling(**{"temperature": 1.0, **settings}), prompt)


def random_logits(seed: int, vocabulary: int = 5000, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    ("settings", "processors"), FILTERS, ids=["+".join(map(str, f[0].items())) or "none" for f in FILTERS]
)
def test_filters_are_those_of_transformers(settings, processors, spread):
    """Probabilities agree to rounding; a token at the very edge of a filter may be in or out."""
    for seed in range(3):
        logits = random_logits(seed, spread=spread)
        theirs = logits[None]
        for process in processors:
            theirs = process(torch.tensor([SEEN]), theirs)
        p, q = sampler(**settings).scores(logits).softmax(0), theirs[0].softmax(0)
        edge = (p > 0) != (q > 0)
        assert int(edge.sum()) <= 1
        assert float((p - q).abs().max()) <= 1e-5 + float((p + q)[edge].sum())


def chi_square(found: Tensor, p: Tensor, draws: int) -> tuple[float, float]:
    """The statistic, and a bound that chance passes once in 10^6 (Wilson and Hilferty); rare tokens are one class."""
    expected = p * draws
    common = expected >= 5
    rest = torch.stack([found[~common].sum(), expected[~common].sum()])
    parts = [(found[common] - expected[common]).square() / expected[common]]
    if rest[1] > 0:
        parts.append(((rest[0] - rest[1]).square() / rest[1])[None])
    k = sum(len(part) for part in parts) - 1
    return float(torch.cat(parts).sum()), k * (1 - 2 / (9 * k) + 4.75 * math.sqrt(2 / (9 * k))) ** 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_p": 0.6},
        {"top_k": 3},
        {"min_p": 0.2},
        {"typical_p": 0.7},
        {"logit_bias": {0: -1.5, 4: 2.0, 5: -math.inf}},
        {"repetition_penalty": 1.8},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_draws_have_the_distribution(settings):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    made, draws = sampler(list(range(6)), **settings), 6000  # all were seen before, so that all draws are alike
    p = made.scores(logits).softmax(0).double()
    found = torch.bincount(torch.tensor([made.choose(logits) for _ in range(draws)]), minlength=6).double()
    assert not bool(found[p == 0].any())
    statistic, bound = chi_square(found, p, draws)
    assert statistic < bound


def test_a_wide_distribution_is_met_too():
    logits = random_logits(7, vocabulary=300, spread=1.0)
    made = sampler()
    p = logits.double().softmax(0)
    found = torch.bincount(torch.tensor([made.choose(logits) for _ in range(20000)]), minlength=300).double()
    statistic, bound = chi_square(found, p, 20000)
    assert statistic < bound


def test_presence_and_frequency():
    """Taken from tokens of the new text alone, once and for each time."""
    logits = random_logits(1, vocabulary=8)
    made = sampler([1, 2], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={5: 100, 6: 0.0})
    assert [made.choose(logits) for _ in range(3)] == [5, 5, 5]
    expected = logits.clone()
    expected[5] += 100 - 0.5 - 3 * 0.25
    torch.testing.assert_close(made.scores(logits), expected)


def test_a_seed_is_a_text():
    logits = random_logits(2)

    def draw(seed: int) -> list[int]:
        made = sampler(seed=seed)
        return [made.choose(logits) for _ in range(20)]

    torch.manual_seed(1)
    first = draw(5)
    torch.manual_seed(2)  # nobody else's generator
    assert draw(5) == first != draw(6)
    assert draw(2**64 - 1) == draw(2**64 - 1)
    assert draw(-1)


def test_greedy_is_the_best_and_nothing_is_filtered():
    logits = random_logits(3)
    made = sampler(temperature=0.0, top_k=1, top_p=0.1)
    assert made.choose(logits) == int(logits.argmax())
    assert made.scores(logits) is logits


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_small_temperatures_overflow_nothing(temperature):
    logits = 1e4 * random_logits(4)
    assert sampler(temperature=temperature).choose(logits) == int(logits.argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    logits = random_logits(5)
    logits[7] = bad
    with pytest.raises(ModelError, match="no token can be chosen"):
        sampler(temperature=temperature).choose(logits)
    with pytest.raises(ModelError):
        sampler(temperature=temperature).choose(torch.full((10,), -math.inf))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"stop": ("",)},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_values_out_of_range(settings):
    with pytest.raises(UsageError):
        Sampling(**settings)


def test_a_bias_for_a_token_that_there_is_not():
    with pytest.raises(BitfoldError, match="no token 5000"):
        sampler(logit_bias={5000: 1.0}).choose(random_logits(6))


def test_what_is_not_said_is_as_the_model_says():
    config = hf.GenerationConfig(repetition_penalty=1.1, min_p=0.1)
    filled = Sampling(min_p=0.0).filled(config)
    assert (filled.repetition_penalty, filled.min_p, filled.typical_p) == (1.1, 0.0, 1.0)
