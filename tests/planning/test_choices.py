"""Formats for a size: laws of the choice, on weights whose costs are made up, and what is reckoned of real ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitfold.checkpoints.gguf.imatrix import Importance
from bitfold.models.sites import EMBEDDING, LINEAR, OUTPUT_HEAD, Site
from bitfold.planning.choices import CANDIDATES, Weight, everywhere, grouped, least_cost, uniform, weigh
from bitfold.planning.decisions import Quantized
from bitfold.recipes.recipe import Recipe
from bitfold.system.tensorinfo import TensorInfo

NAMES = [f"model.layers.{i}.{part}" for i in range(3) for part in ("attn.q", "attn.k", "attn.v", "mlp.up")]
SHARING = [tuple(f"model.layers.{i}.attn.{part}" for part in "qkv") for i in range(3)]


def weights(seed: int) -> list[Weight]:
    """Costs that fall and sizes that rise from candidate to candidate."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for name in [*NAMES, "embed"]:
        site = Site(f"{name}.weight", LINEAR, (64, 32), OUTPUT_HEAD if name == "embed" else None)
        scale, numel = (float(x) for x in torch.rand(2, generator=random))
        errors = tuple(4.0**-i for i in range(len(CANDIDATES)))
        sizes = tuple(int(1000 * numel + 100) * (i + 2) for i in range(len(CANDIDATES)))
        found.append(Weight(site, tuple(scale * e for e in errors), errors, sizes))
    return found


def size(choice, of):
    return sum(w.sizes[choice.picked[w.site.tensor]] for w in of)


@pytest.mark.parametrize("seed", range(10))
def test_no_larger_than_the_budget_no_worse_than_uniform_groups_alike(seed: int) -> None:
    of = weights(seed)
    groups = grouped([w.site.tensor for w in of], SHARING)
    sizes = [size(everywhere(of, i), of) for i in range(len(CANDIDATES))]
    costs = []
    for budget in (sizes[0], sizes[0] + 777, sizes[1], (sizes[1] + sizes[2]) // 2, sizes[-1], 2 * sizes[-1]):
        chosen = least_cost(of, groups, budget)
        assert size(chosen, of) <= budget
        for group in groups:
            assert len({chosen.picked[name] for name in group}) == 1
        other = uniform(of, lambda choice, limit=budget: size(choice, of) <= limit)
        assert other is not None
        assert chosen.cost(of) <= other.cost(of) * (1 + 1e-12)
        costs.append(chosen.cost(of))
    assert costs == sorted(costs, reverse=True)
    assert uniform(of, lambda _: False) is None


def test_groups() -> None:
    experts = [f"layers.0.mlp.experts.{i}.{part}.weight" for i in (0, 1) for part in ("w1", "w2")]
    fused = ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    shared = "layers.1.mlp.shared_experts.up.weight"
    found = grouped([*experts, *fused, shared, "a.q.weight", "a.k.weight", "b.weight"], [("a.q", "a.k"), ("b",)])
    assert found == [experts, fused, [shared], ["a.q.weight", "a.k.weight"], ["b.weight"]]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_choice_is_an_ordinary_recipe(calibrated: bool) -> None:
    of = weights(0)
    chosen = least_cost(of, [[w.site.tensor] for w in of], size(everywhere(of, 2), of))
    rules = chosen.recipe(of, calibrated=calibrated, act=None)
    assert Recipe.loads(rules.dumps()) == rules
    for w in of:
        rule = rules.find(w.site.tensor, default_keep=True)
        assert rule is not None
        assert rule.format == CANDIDATES[chosen.picked[w.site.tensor]].format
        assert rule.needs_text == (calibrated and not w.site.is_table and rule.method != "rtn")


def test_what_is_reckoned() -> None:
    """Errors are those of the formats, costs are errors times what they cost where they are, sizes are exact."""
    torch.manual_seed(0)
    w = torch.randn(96, 64)
    rows = torch.cat([torch.ones(48), torch.full((48,), 3.0)])
    entry = Importance(torch.ones(64), torch.full((64,), 0.5), rows)
    site = Site("a.weight", LINEAR, (96, 64))
    rule = CANDIDATES[0].rule(site, calibrated=False, act=None)
    decision = Quantized("a.weight", TensorInfo(torch.bfloat16, (96, 64)), "", site, rule.scheme)
    found = weigh(decision, entry, w, 0)
    assert found.errors[:3] == pytest.approx([0.070, 0.018, 0.0047], rel=0.15)  # docs/trellis.md, and short rows
    assert list(found.sizes) == sorted(found.sizes)
    assert found.sizes[1] == 96 * 64 * 3 // 8 + 2 * 96
    energy = float((0.5 * rows * w.square().sum(1)).sum())
    assert found.costs == pytest.approx([energy * e for e in found.errors], rel=1e-5)
    # On rotated inputs an error is in all of them alike, however much more one of them matters; on plain ones not.
    uneven = Importance(torch.ones(64), torch.cat([torch.full((1,), 32.0), torch.zeros(63)]), rows)
    again = weigh(decision, uneven, w, 0)
    assert again.costs[:4] == pytest.approx(found.costs[:4], rel=1e-5)
    assert again.costs[4] != pytest.approx(found.costs[4], rel=1e-3)
    stack = replace(site, kind=EMBEDDING)
    assert weigh(replace(decision, site=stack), entry, w, 0).sizes == found.sizes
