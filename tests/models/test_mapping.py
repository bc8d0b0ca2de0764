"""Checkpoints that lack tensors of their model: what most likely went wrong is said."""

from __future__ import annotations

import re

import pytest

import tiny_lm
from bitfold.errors import ModelError
from bitfold.models.mapping import map_names

NAMES = list(tiny_lm.model().state_dict())


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ([f"module.{n}" for n in NAMES], "'module.' in their names .* as DistributedDataParallel leaves it"),
        ([f"_orig_mod.{n}" for n in NAMES], "'_orig_mod.' in their names .* as torch.compile leaves it"),
        ([n.replace("layers.1.", "layers.1._orig_mod.") for n in NAMES], "as torch.compile leaves it"),
        ([f"wrapped.net.{n}" for n in NAMES], "begin with 'wrapped.net.'"),
        ([n for n in NAMES if "layers.1." not in n], "asks for 2 layers, the files have 1"),
        ([n for n in NAMES if "q_proj" not in n], "`architectures` in config.json"),
    ],
)
def test_why_tensors_are_missing(names: list[str], hint: str) -> None:
    with pytest.raises(ModelError, match="lacks") as raised:
        map_names(names, tiny_lm.model().to("meta"))
    assert re.search(hint, raised.value.hint or ""), raised.value.hint
