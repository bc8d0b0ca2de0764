"""Generation defaults that cannot be used are left out with a word, never the end of a command."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitfold.checkpoints.untrusted import read_json_object
from bitfold.models.skeleton import give_generation


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"cache_implementation": "none such"}', '{"max_new_tokens": -1}'])
def test_damaged(text: str, tmp_path: Path) -> None:
    """Whatever is wrong: the model keeps what it had."""
    file = tmp_path / "generation_config.json"
    file.write_bytes(text.encode("latin-1"))
    model = SimpleNamespace(generation_config="as it was")
    with pytest.warns(UserWarning, match="cannot be used"):
        give_generation(model, lambda: read_json_object(file), "folder")
    assert model.generation_config == "as it was"


def test_sound() -> None:
    """Taken as they are; modules without any are left alone."""
    model, plain = SimpleNamespace(generation_config=None), SimpleNamespace()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        give_generation(model, lambda: {"max_new_tokens": 7}, "folder")
        give_generation(plain, lambda: {"max_new_tokens": 7}, "folder")
    assert model.generation_config.max_new_tokens == 7
    assert not vars(plain)
