"""Which of bitfold's own formats each weight of a model gets, so that the whole model has a size and loses least.

Weights that engines run as one, such as queries, keys and values, or the experts of a layer, get the same format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bitfold.checkpoints.gguf.imatrix import Importance
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.sites import Site
from bitfold.models.swap import transform_of
from bitfold.planning.allocation import allocate
from bitfold.planning.costs import Coder, error_costs, some_rows
from bitfold.planning.decisions import Quantized
from bitfold.recipes.recipe import Recipe, Rule

_EXPERT = re.compile(r"(.*\.)?experts\.")


@dataclass(frozen=True)
class Candidate:
    """A format, and how it is made.

    Args:
        format: its name.
        rotated: whether inputs are rotated first.
        method: that calibrates it; "rtn" = it is rounded to nearest.
    """

    format: str
    rotated: bool
    method: str

    def turns(self, site: Site) -> bool:
        """Whether inputs are rotated: of embeddings and output heads always, where large columns are common."""
        return self.rotated or site.is_table

    def rule(self, site: Site, *, calibrated: bool, act: str | None) -> Rule:
        """What makes it of a weight; embeddings and output heads are rounded to nearest."""
        method = self.method if calibrated and not site.is_table else "rtn"
        rotation = "hadamard" if self.turns(site) else "none"
        # Activations are left to measurement where those of `--bits` are.
        usual = "auto" if method != "rtn" else "float"
        return Rule(site.tensor, self.format, method, transform=rotation, act=usual if site.is_table else act or usual)


# In order of size. Left out is what another of no more bits does better, and what costs more than going from one of
# these to the next brings: int5 on rotated inputs has two thirds of the error of trellis-4, int6 a fifth.
CANDIDATES = (
    Candidate("trellis-2", rotated=True, method="trellis"),
    Candidate("trellis-3", rotated=True, method="trellis"),
    Candidate("trellis-4", rotated=True, method="trellis"),
    Candidate("int6", rotated=True, method="ldlq"),
    Candidate("int8", rotated=False, method="rtn"),
)


@dataclass(frozen=True)
class Weight:
    """A weight that gets one of CANDIDATES; the lists are in their order.

    Args:
        site: where it is in the model.
        costs: nats a token.
        errors: relative square errors.
        sizes: bytes.
    """

    site: Site
    costs: tuple[float, ...]
    errors: tuple[float, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Which candidate each weight gets, by name."""

    picked: Mapping[str, int]

    def recipe(self, weights: Iterable[Weight], *, calibrated: bool, act: str | None) -> Recipe:
        """A rule for each weight."""
        picked = ((w.site, CANDIDATES[self.picked[w.site.tensor]]) for w in weights)
        return Recipe(tuple(candidate.rule(site, calibrated=calibrated, act=act) for site, candidate in picked))

    def cost(self, weights: Iterable[Weight]) -> float:
        """Of all of them, nats a token."""
        return sum(w.costs[self.picked[w.site.tensor]] for w in weights)

    def errors(self, weights: Iterable[Weight]) -> dict[str, float]:
        """Relative square error of each."""
        return {w.site.tensor: w.errors[self.picked[w.site.tensor]] for w in weights}


def weigh(decision: Quantized, entry: Importance, w: torch.Tensor, seed: int) -> Weight:
    """What the candidates cost at a weight.

    Args:
        decision: that it is quantized.
        entry: with costs, of this weight.
        w: the tensor of the model.
        seed: of rotations.
    """
    site = decision.site
    matrix = site.oriented(w).reshape(-1, site.qshape[-1])
    rules = [c.rule(site, calibrated=False, act=None) for c in CANDIDATES]
    coders = [_coder(rule, site, seed) for rule in rules]
    plain = Importance(torch.ones(matrix.shape[1]), torch.ones(matrix.shape[1]) / max(1e-30, _energy(matrix)))
    sizes = [replace(decision, scheme=rule.scheme).nbytes() for rule in rules if rule.scheme is not None]
    errors = error_costs(some_rows(matrix), plain, coders)
    costs = [
        _rotated(matrix, entry) * error if candidate.turns(site) else error_costs(matrix, entry, [coder])[0]
        for candidate, coder, error in zip(CANDIDATES, coders, errors, strict=True)
    ]
    return Weight(site, tuple(costs), tuple(errors), tuple(sizes))


def _rotated(matrix: torch.Tensor, entry: Importance) -> float:
    """What the loss of a weight on rotated inputs would cost: errors there are alike in all inputs."""
    assert entry.costs is not None
    energy = matrix.float().square().sum(1)
    return float(entry.costs.mean() * (energy.sum() if entry.rows is None else energy @ entry.rows))


def _energy(matrix: torch.Tensor) -> float:
    return float(some_rows(matrix).square().sum())


def _coder(rule: Rule, site: Site, seed: int) -> Coder:
    scheme = rule.scheme
    assert scheme is not None
    basis = transform_of(scheme, site, seed)

    def code(rows: torch.Tensor) -> torch.Tensor:
        turned = rows if basis is None else basis.weights(rows)
        q = quantize_tensor(turned, scheme.format, method=scheme.solver, fit=scheme.fit, seed=seed).dequantize()
        return q if basis is None else basis.inverse(q)

    return code


def grouped(names: Iterable[str], sharing: Iterable[Sequence[str]]) -> list[list[str]]:
    """Names of weights that get the same format, together.

    Args:
        names: of weights.
        sharing: paths of layers that take the same input, which engines run as one.
    """
    leader = {f"{layer}.weight": layers[0] for layers in sharing for layer in layers}
    groups: dict[str, list[str]] = {}
    for name in names:
        expert = _EXPERT.match(name)
        groups.setdefault(expert[0] if expert else leader.get(name, name), []).append(name)
    return list(groups.values())


def least_cost(weights: Sequence[Weight], groups: Sequence[Sequence[str]], budget: int) -> Choice:
    """The choice of least cost within so many bytes, exactly.

    Raises:
        UsageError: the smallest choices are too large together.
    """
    by_name = {w.site.tensor: w for w in weights}
    members = [[by_name[name] for name in group] for group in groups]
    costs = [[sum(w.costs[i] for w in group) for i in range(len(CANDIDATES))] for group in members]
    sizes = [[sum(w.sizes[i] for w in group) for i in range(len(CANDIDATES))] for group in members]
    picked = allocate(costs, sizes, budget)
    return Choice({name: i for group, i in zip(groups, picked, strict=True) for name in group})


def everywhere(weights: Sequence[Weight], index: int) -> Choice:
    """One candidate for all."""
    return Choice({w.site.tensor: index for w in weights})


def uniform(weights: Sequence[Weight], fits: Callable[[Choice], bool]) -> Choice | None:
    """The best that one format for all layers and one for all tables can do; None where none fits."""
    every = range(len(CANDIDATES))
    pairs = [Choice({w.site.tensor: t if w.site.is_table else i for w in weights}) for i in every for t in every]
    return next((c for c in sorted(pairs, key=lambda c: c.cost(weights)) if fits(c)), None)
