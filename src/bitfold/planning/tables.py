"""Tables with a row for every word, embeddings and output heads: what becomes of them where only bits are asked for.

In a small model they are a third of all weights, and in most recipes they stay in 16 bits. In 8 bits with a scale for
each row, their inputs rotated, they cost less than 0.001 nats a token; unrotated 0.006 where a few columns are large
(Gemma 3), in 6 bits ten to sixteen times as much (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bitfold.checkpoints import Source
from bitfold.models.rehearsal import rehearse
from bitfold.models.sites import Site, find_sites, guess_sites
from bitfold.planning.decisions import Kept
from bitfold.planning.plan import Plan, make_plan
from bitfold.recipes.recipe import Recipe, Rule

FORMAT, TRANSFORM = "int8", "hadamard"
_VOCABULARY = "vocab_size"


def with_tables(
    source: Source, model: nn.Module | None, recipe: Recipe, plan: Plan, seed: int
) -> tuple[Recipe, Plan, tuple[str, ...]]:
    """The recipe with a rule for each table that it keeps by default, and what that makes of the model; where the
    quantized model would then not run, what was given, and why, in words.

    Args:
        source: the open checkpoint.
        model: its skeleton; None: sites are judged by name and shape.
        recipe: the rules, which count first: what one of them names is left to it.
        plan: what they make of the model.
        seed: of the run.
    """
    decisions = {d.tensor: d for d in plan.decisions}
    infos = {name: d.info for name, d in decisions.items()}
    sites = find_sites(model) if model is not None else guess_sites(infos, source.config)
    stored = [site for site in sites if isinstance(decisions.get(site.tensor), Kept)]
    whole = naming_tables(recipe, stored, source.config)
    if whole == recipe:
        return recipe, plan, ()
    made = make_plan(source, model, whole, shorten_groups=True)
    obstacle = None if model is None else rehearse(model, made.entries(seed))
    if obstacle is None or model is None or rehearse(model, plan.entries(seed)) is not None:
        return whole, made, ()
    return recipe, plan, (f"embeddings and output head stay as they are: {obstacle}",)


def naming_tables(recipe: Recipe, sites: Iterable[Site], config: Mapping[str, Any]) -> Recipe:
    """The recipe with a rule for each of these sites that is a table, and that none of its rules names.

    Args:
        recipe: the rules.
        sites: of a model.
        config: contents of its config.json.
    """
    words = vocabulary_size(config)
    tables = [
        site for site in sites if _has_all_words(site, words) and recipe.find(site.tensor, default_keep=True) is None
    ]
    return Recipe((*recipe.rules, *(Rule(site.tensor, FORMAT, transform=TRANSFORM) for site in tables)))


def _has_all_words(site: Site, words: int | None) -> bool:
    return site.is_table and site.keep is not None and words is not None and site.qshape[0] >= words


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Words that a model knows, by its config or that of its text model; None where neither says."""
    for part in (config, config.get("text_config") or {}):
        found = part.get(_VOCABULARY) if isinstance(part, Mapping) else None
        if isinstance(found, int) and found > 0:
            return found
    return None
