"""What errors cost, by gradients, against what they do cost; mean squares against the inputs themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_lm
from bitfold.calibration.importance import by_gradients
from bitfold.calibration.options import Calibration
from bitfold.calibration.shape import walk_shape
from bitfold.checkpoints import open_source
from bitfold.errors import ModelError
from bitfold.models.opening import open_skeleton
from bitfold.run.importance import measured


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(0))


def divergence(model: torch.nn.Module, changed: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


LAYER = "model.layers.0."
NAMES = [
    f"{LAYER}self_attn.v_proj",
    f"{LAYER}mlp.down_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
    "model.embed_tokens",
]


def made(alike: float) -> torch.nn.Module:
    """A model in which the inputs of all tokens have a part in common."""
    model = tiny_lm.model()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[:, :8] += alike
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_costs_are_what_errors_cost(name: str, alike: float, ids: torch.Tensor) -> None:
    """Random errors, small enough for second order: the measured divergence within a factor of two."""
    model, changed = made(alike), made(alike)
    found = by_gradients(made(alike), walk_shape(tiny_lm.model().to("meta")), ids, seed=1)[f"{name}.weight"]
    assert found.costs is not None
    w = changed.get_parameter(f"{name}.weight").requires_grad_(False)
    error = 0.01 * w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
    w += error
    rows = torch.ones(len(w)) if found.rows is None else found.rows
    reckoned = float(rows @ error.square() @ found.costs)
    assert 0.5 < reckoned / divergence(model, changed, ids) < 2


def test_squares_are_those_of_the_inputs(ids: torch.Tensor) -> None:
    model = tiny_lm.model()
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(f"{LAYER}mlp.gate_proj")
    handle = layer.register_forward_pre_hook(lambda _m, x: seen.append(x[0].square().flatten(0, -2).mean(0)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    found = by_gradients(model, walk_shape(tiny_lm.model().to("meta")), ids, seed=0)
    torch.testing.assert_close(found[f"{LAYER}mlp.gate_proj.weight"].squares, seen[0], rtol=1e-4, atol=1e-6)


def test_a_tied_weight_costs_for_both_its_uses(ids: torch.Tensor) -> None:
    model = tiny_lm.model()
    apart = by_gradients(model, walk_shape(tiny_lm.model().to("meta")), ids, seed=0)
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr, assignment]
    together = by_gradients(model, walk_shape(tiny_lm.model().to("meta")), ids, seed=0)
    assert "lm_head.weight" not in together
    entry, looked_up = together["model.embed_tokens.weight"], apart["model.embed_tokens.weight"]
    assert float(entry.rows.mean() * entry.costs.mean()) > float(looked_up.rows.mean() * looked_up.costs.mean())


def test_with_and_without_gradients_inputs_are_the_same(tmp_path: Path) -> None:
    folder, text = tiny_lm.folder(tmp_path / "m", tiny_lm.model()), tmp_path / "text.txt"
    text.write_text(tiny_lm.TEXT)
    source = open_source(folder)
    how = (Calibration(str(text), 4, 32), 0)
    one, other = (measured(source, open_skeleton(source), *how, gradients=g) for g in (True, False))
    assert (one.tokens, one.window) == (128, 32)
    assert set(one.entries) == set(other.entries) | {"token_embd.weight", "output.weight"}
    for name, entry in other.entries.items():
        assert entry.costs is None
        torch.testing.assert_close(entry.squares, one.entries[name].squares, rtol=1e-4, atol=1e-6)
    with pytest.raises(ModelError, match="text"):
        measured(source, open_skeleton(source), Calibration("self", 4, 32), 0, gradients=None)
    source.close()
